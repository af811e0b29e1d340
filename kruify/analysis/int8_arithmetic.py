"""What the eight-bit kernels compute, by other means: the same integers and scales, the step of the cell in float64.
The arithmetic is described in csrc/README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kruify.layers import int8
from kruify.layers.backend import Weights
from kruify.layers.cells import KRUCellBase
from kruify.layers.matrix import KroneckerMatrix, exact
from kruify.layers.recurrent import RecurrentLayer
from kruify.layers.reference import step_from_input
from kruify.ops import Layout, reference
from kruify.ops.reference import GATES, State


def exact_step(layer: RecurrentLayer | KRUCellBase, weights: Weights, x: Tensor, state: State) -> State:
    """One step of a layer and direction, or of a cell, in which what the kernels round is rounded.

    Args:
        weights: of the layer and direction.
        x: float32 (batch, features). state: float32, each (batch, size).

    Returns:
        the state in float64.
    """
    kind, given = layer.kernel_kind, {name: _double(weight) for name, weight in weights.items()}
    for name in int8.names_in_integers(layer, weights):
        given[name] = _Product(weights[name], GATES[kind])
    return step_from_input(kind, given, x.double(), tuple(s.double() for s in state))


class _Product:
    """A weight as the kernels multiply with it."""

    def __init__(self, weight: Any, gates: int) -> None:
        self.weight, self.gates = weight, gates
        first, self.second, layout = int8.matrices(weight, gates)
        self.first, self.spans = first, list(zip(layout[4::2], layout[5::2], strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, cols) float64 -> (batch, gates * rows) float64."""
        z = x.float()
        if self.first is not None:
            z = _scaled(*_integers(z), *_packed(self.first))
        numbers, scales = _integers(z)
        parts = []
        for (start, count), rows in zip(self.spans, self.second.chunk(self.gates), strict=True):
            parts.append(_scaled(numbers[:, start : start + count], scales, *_packed(rows[:, :count])))
        product = torch.cat(parts, 1).double()
        if not isinstance(self.weight, KroneckerMatrix):
            return product
        diagonal, values, index = self.weight.parts_beside_terms()
        layout = Layout(self.gates, self.weight.rows, self.weight.cols, self.weight.diagonal_gates, ()).encode()
        return product + reference.kron_matmul(x, [], _double(diagonal), _double(values), index, None, layout)


def _scaled(numbers: Tensor, scales: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Integers (batch, k) times integers (m, k), with their scales, float32 (batch, m)."""
    return (numbers @ weights.T).float() * (rows * scales[:, None])


def _integers(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as they are rounded on their way into a product: integers in float64, scales in float32."""
    largest = vectors.abs().amax(1)
    inverse = torch.where(largest > 1e-30, 127 / largest.clamp(min=1e-30), 0.0)
    return (vectors * inverse[:, None]).round().double(), largest / 127


def _packed(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as weights are rounded; those of such integers stay."""
    largest, whole = weights.abs().amax(1), (weights == weights.round()).all(1)
    scales = torch.where(whole & (largest > 0) & (largest <= 127), 1.0, largest / 127)
    return (weights / torch.where(scales > 0, scales, 1.0)[:, None]).round().double(), scales


def _double(weight: Any) -> Any:
    if isinstance(weight, KroneckerMatrix):
        return exact(weight)
    return weight if weight is None else weight.double()
