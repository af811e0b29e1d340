"""The reference backend: a loop over time in plain torch. It runs whatever the others cannot: any device and dtype,
projections, the transforms of torch.func, forward-mode derivatives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.matrix import apply_weight
from kruify.ops import reference
from kruify.ops.reference import MODRELU, State

if TYPE_CHECKING:
    from kruify.layers.recurrent import RecurrentLayer


class ReferenceBackend:
    """See the module."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        sizes = [input.batch] * input.steps if input.packed_sizes is None else input.packed_sizes.tolist()
        output, final = run_each_direction(
            layer, input.packed(), state, partial(run_direction, layer.kernel_kind, sizes)
        )
        return output, tuple(s.clone() for s in final)  # a user may change them in place, as torch.nn's


def run_direction(
    kind: str,  # a key of kruify.ops.reference.GATES
    batch_sizes: list[int],
    weights: Weights,
    data: Tensor,  # (sum of batch_sizes, features)
    state: State,  # each (batch_sizes[0], size); complex for kind "rnn_modrelu_complex"
    reverse: bool = False,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    """Runs one layer in one direction."""

    def saving_nothing(gates_x: Tensor, state: State) -> tuple[State, Tensor]:
        return step(kind, weights, gates_x, state), gates_x[:, :0]

    gates_x = input_gates(kind, weights, data)
    output, final, _ = reference.over_time(saving_nothing, gates_x, batch_sizes, state, reverse)
    return reference.planar(output), final


def input_gates(kind: str, weights: Weights, data: Tensor) -> Tensor:
    """W_ih x + b_ih of all steps at once."""
    weight = weights["weight_ih"]
    if kind != "rnn_modrelu_complex":
        return apply_weight(weight, data, weights["bias_ih"])  # type: ignore[arg-type]
    assert isinstance(weight, Tensor)  # of a real x: two real products instead of a complex one
    parts = (F.linear(data, part).to(part.dtype) for part in (weight.real, weight.imag))  # autocast lowers a product
    return torch.complex(*parts)


def step_from_input(kind: str, weights: Weights, x: Tensor, state: State) -> State:
    """One step of a cell, x (batch, features)."""
    return step(kind, weights, input_gates(kind, weights, x), state)


def step(kind: str, weights: Weights, gates_x: Tensor, state: State) -> State:
    """One step of a layer or cell from W_ih x + b_ih (batch, gates * hidden)."""
    kind = "rnn_modrelu" if kind in MODRELU else kind  # a complex state stands for itself here
    weight, bias, w_hr = weights["weight_hh"], weights["bias_hh"], weights["weight_hr"]
    inner, outer = (None, bias) if kind in MODRELU else (bias, None)
    product = apply_weight(weight, state[0], inner)  # type: ignore[arg-type]
    new, _ = reference.cell(kind, gates_x, product, state, outer)  # type: ignore[arg-type]
    return new if w_hr is None else (F.linear(new[0], w_hr), *new[1:])  # type: ignore[arg-type]
