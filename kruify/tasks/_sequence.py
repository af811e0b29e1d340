"""One recurrent layer between inputs and predictions: the network of most built-in tasks, and their options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.tasks._cells import last_output, output_size, recurrent
from kruify.tasks.base import Task


class SequenceNetwork(nn.Module):
    """A recurrent layer `rnn` and a linear layer `fc`.

    Args:
        inputs: features of an input step; with one_hot the number of symbols.
        outputs: predictions of one step.
        one_hot: inputs are int64 symbols and become one-hot vectors.
        last: predict once, after the last step, instead of at every step.
    """

    def __init__(self, inputs: int, outputs: int, options: SequenceTask, *, one_hot: bool = False, last: bool = False):
        super().__init__()
        self.inputs, self.one_hot, self.last = inputs, one_hot, last
        between = (
            options.dropout if options.layers > 1 else 0.0
        )  # torch warns of dropout between layers that are not there
        self.rnn = recurrent(
            options.cell,
            inputs,
            options.hidden,
            factors=options.factors,
            start=options.start,
            num_layers=options.layers,
            dropout=between,
            batch_first=True,
        )
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(output_size(self.rnn), outputs)

    def forward(
        self,
        x: Tensor,  # (batch, steps, inputs), or (batch, steps) int64 with one_hot
    ) -> Tensor:  # (batch, steps, outputs), or (batch, outputs) with last
        return self.run(x, None)[0]

    def run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the predictions and the state behind the last step, given the one before the first."""
        if self.one_hot:
            weight: object = self.fc.weight  # a method where the network is quantised to int8
            dtype = weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()
            x = functional.one_hot(x, self.inputs).to(dtype)
        outputs, state = self.rnn(x, state)
        if self.last:
            outputs = last_output(state)
        return self.fc(self.dropout(outputs)), state


class Batch(NamedTuple):
    """What goes in, what should come out, and where that counts."""

    x: Tensor  # (batch, steps, ...)
    y: Tensor  # (batch, ...) or (batch, steps, ...)
    mask: Tensor | None = None  # (batch, steps) bool; None: everywhere


@dataclass(eq=False)
class SequenceTask(Task):
    """Options that these tasks share; each overrides the defaults that suit it.

    Args:
        hidden: hidden size.
        cell: "lstm", "gru", "rnn", "kru-" and one of them, or the unit itself: "kru" (complex), "kru-real".
        factors: factor spec of a kru cell.
        start: how the weights of a "kru" or "kru-real" begin, "linear" or "small" (kruify.layers.KRU).
        layers: recurrent layers.
        dropout: on the outputs of every recurrent layer.
        batch_size: examples in a training batch.
    """

    hidden: int = 128
    cell: str = "lstm"
    factors: str = "auto"
    start: str = "linear"
    layers: int = 1
    dropout: float = 0.0
    batch_size: int = 64

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return cast(Tensor, model(batch.x))

    def weight(self, batch: Batch) -> float:
        """Return the number of sequences in the batch; they are equally long, unless a subclass says otherwise."""
        return float(len(batch.x))


@dataclass(eq=False)
class FramewiseTask(SequenceTask):
    """Sequences of different lengths; the mask says which frames count."""

    def weight(self, batch: Batch) -> float:
        """Return the number of frames that the loss is over."""
        assert batch.mask is not None  # batches() makes one
        return float(batch.mask.sum())


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the numbers below `count` in an order that follows from `seed`, `size` at a time."""
    generator = torch.Generator().manual_seed(seed)
    yield from torch.split(torch.randperm(count, generator=generator), size)
