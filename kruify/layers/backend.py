"""What runs a layer: one protocol, three implementations (compiled.py, dense.py, reference.py); dispatch.py chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.layers.matrix import KroneckerMatrix
from kruify.ops.reference import State

if TYPE_CHECKING:
    from kruify.layers.recurrent import RecurrentLayer

Weights = dict[str, KroneckerMatrix | Tensor | None]  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
Direction = Callable[[Weights, Tensor, State, bool], tuple[Tensor, State]]  # weights, data, state, reverse


@dataclass(slots=True)  # frozen ones take several times as long to make
class Sequences:
    """A batch of sequences one step after the other, sorted by descending length, as in a PackedSequence.

    Attributes:
        data: (sum of batch_sizes, features), or (steps, batch, features) where every sequence has all steps.
        steps: of the longest sequence.
        batch: number of sequences.
        packed_sizes: the batch_sizes of a PackedSequence; None where every sequence has all steps.
    """

    data: Tensor
    steps: int
    batch: int
    packed_sizes: Tensor | None = None

    @property
    def batch_sizes(self) -> Tensor:
        """Sequences still running at each step: (steps,) int64 on the CPU."""
        sizes = self.packed_sizes
        return torch.full((self.steps,), self.batch, device="cpu") if sizes is None else sizes

    @property
    def rectangular(self) -> bool:
        """Whether every sequence has all steps."""
        return self.packed_sizes is None or self.data.shape[0] == self.steps * self.batch

    def packed(self) -> Tensor:
        """(sum of batch_sizes, features)."""
        return self.data.flatten(0, -2)

    def padded(self) -> Tensor:
        """(steps, batch, features) of a rectangular batch."""
        return self.data if self.data.dim() == 3 else self.data.view(self.steps, self.batch, -1)


class Backend(Protocol):
    """One way to compute a recurrent layer: the function is the same, whoever runs it."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        """All layers and directions.

        Args:
            state: initial h, or (h, c), each (layers * directions, batch, size).

        Returns:
            outputs (sum of batch_sizes, directions * size), of a rectangular batch also (steps, batch, directions *
            size); and the final state in the form of `state`.
        """


def run_each_direction(
    layer: RecurrentLayer, data: Tensor, state: State, run_direction: Direction
) -> tuple[Tensor, State]:
    """One layer and direction after the other, dropout between the layers."""
    directions = layer.num_directions
    if directions == layer.num_layers == 1:  # the same with less around it
        data, final = run_direction(layer.weights(0, 0), data, tuple([s[0] for s in state]), False)
        return data, tuple([s.unsqueeze(0) for s in final])
    finals: list[State] = []
    for k in range(layer.num_layers):
        if k and layer.dropout:
            data = F.dropout(data, layer.dropout, layer.training)
        outputs = []
        for d in range(directions):
            own = tuple(s[len(finals)] for s in state)
            output, final = run_direction(layer.weights(k, d), data, own, d == 1)
            outputs.append(output)
            finals.append(final)
        data = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
    return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
