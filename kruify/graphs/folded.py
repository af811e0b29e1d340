"""A weight as small constants and standard operators, which a runtime works out once, when it loads the model.

    int8 -> Cast -> Mul(scale)        eight bits
    U, V -> MatMul                    a sum of Kronecker products; low rank is one
    gaps -> CumSum -> ScatterND       a sparse residual

onnxruntime folds all of them into one constant and then runs its own LSTM, GRU or RNN kernel on it. DequantizeLinear is
not folded and does not appear. Reshape stands for Unsqueeze, whose axes moved from attribute to input with opset 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kruify.checkpoint.gates import from_torch
from kruify.checkpoint.integers import SCALE
from kruify.checkpoint.onnx_constants import DTYPES
from kruify.errors import UnsupportedError
from kruify.factors import Structure
from kruify.graphs.nodes import Graph
from kruify.layers.matrix import group_terms

ELEMENTS = {dtype: number for number, dtype in DTYPES.items()}
OPSETS = {"Mul": 7, "EyeLike": 9, "CumSum": 11, "ScatterND": 11}
"""Operators -> ONNX's opset from which on they are what is needed here."""


class Stored(NamedTuple):
    """Numbers as a file stores them, and what they are multiplied with: as many dimensions, each as long or 1."""

    values: Tensor
    scale: Tensor | None = None

    def permute(self, *dims: int) -> Stored:
        return Stored(self.values.permute(dims), None if self.scale is None else self.scale.permute(dims))

    def squeeze(self, dim: int) -> Stored:
        return Stored(self.values.squeeze(dim), None if self.scale is None else self.scale.squeeze(dim))


class StoredTerm(NamedTuple):
    """A sum of products as a file stores it (`layers.matrix.KroneckerTerm`).

    Attributes:
        gates: torch's gates that it belongs to.
        factors: (gates, rank, P_f, Q_f) each; what gates share stands there once.
        scale: (gates, rank), or None.
    """

    gates: tuple[int, ...]
    factors: Sequence[Stored]
    scale: Tensor | None

    def ordered(self, order: Sequence[int]) -> list[Stored]:
        """The factors, the scale in the first of them, of these places in `gates`."""
        shared = [len(factor.values) == 1 < len(self.gates) for factor in self.factors]
        factors = [f if one else take(f, order) for f, one in zip(self.factors, shared, strict=True)]
        factors[0] = _scaled(factors[0], None if self.scale is None else self.scale[list(order)])
        return factors


@dataclass(frozen=True)
class Matrix:
    """A Kronecker matrix as a file stores it.

    Attributes:
        structures: one per gate, or one of stacked gates.
        entries: by their names in the matrix, as `checkpoint.stored.encode` gives them.
    """

    structures: Sequence[Structure]
    entries: Mapping[str, Tensor]

    @property
    def stacked(self) -> int:
        """Gates of a structure; 1 where each has its own."""
        return self.structures[0].gates

    @property
    def rows(self) -> int:
        """Of one gate."""
        return self.structures[0].rows // self.stacked

    @property
    def cols(self) -> int:
        return self.structures[0].cols

    @property
    def diagonal_gates(self) -> tuple[int, ...]:
        """The gates of the rows of the diagonal."""
        return tuple(gate for gate, structure in enumerate(self.structures) if structure.diagonal)

    def terms(self) -> Iterator[StoredTerm]:
        """The sums of products."""
        for number, ((term, _, _), gates) in enumerate(group_terms(self.structures).items()):
            names = [f"terms.{number}.factors.{f}" for f in range(len(term.factors))]
            factors = [Stored(self.entries[name], self.entries.get(name + SCALE)) for name in names]
            gates = tuple(range(self.stacked)) if self.stacked > 1 else gates
            yield StoredTerm(gates, factors, self.entries.get(f"terms.{number}{SCALE}"))


class Folder:
    """Adds to a graph what computes weights.

    Args:
        graph: takes constants and nodes.
        opset: of ONNX's operators.
        work: float32 or float64, in which the weights are computed.
    """

    def __init__(self, graph: Graph, opset: int, work: torch.dtype) -> None:
        self.graph, self.opset, self.work = graph, opset, work

    def matrix(self, matrix: Matrix, places: Sequence[int]) -> str:
        """A Kronecker matrix as (1, gates * rows, cols).

        Args:
            places: of torch's gates in the result (`checkpoint.gates.ORDER`).
        """
        stacked, rows, cols, entries = matrix.stacked, matrix.rows, matrix.cols, matrix.entries
        size = (len(places), rows, cols) if stacked == 1 else (1, len(places) * rows, cols)
        parts = []
        for term in matrix.terms():
            factors = term.ordered(sorted(range(len(term.gates)), key=lambda at: places[term.gates[at]]))
            if stacked > 1:  # one product of all gates: the rows of the first factor, gate by gate
                factors[0] = _one_gate(factors[0])
            part = self.product(factors)
            if stacked == 1:
                part = self._placed(part, sorted(places[gate] for gate in term.gates), size)
            parts.append(part)
        if "diagonal" in entries:
            parts.append(self._diagonal(entries["diagonal"], [places[gate] for gate in matrix.diagonal_gates], size))
        if "overlay.values" in entries:
            parts.append(self._sparse(entries, places, size))
        total = self.graph.sum(parts)
        return total if stacked > 1 else self.reshape(total, (1, len(places) * rows, cols))

    def dense(self, stored: Stored, kind: str) -> str:
        """A dense matrix (gates * rows, cols) that is stored otherwise, as `matrix`."""
        values, scale = (None if t is None else from_torch(t, "onnx", kind)[None] for t in stored)
        assert values is not None
        return self.value(Stored(values, scale))

    def value(self, stored: Stored, name: str = "stored") -> str:
        """Numbers in the dtype of the work.

        Args: name: what the constant is called.
        """
        value = self.graph.constant(stored.values, name)
        if stored.values.dtype != self.work:
            value = self.add("Cast", value, to=ELEMENTS[self.work])
        return value if stored.scale is None else self.scaled(value, stored.scale)

    def arranged(self, stored: Stored, order: Sequence[int], shape: Sequence[int], name: str) -> str:
        """`value` with the dimensions in another order, then in another shape."""
        stored = stored.permute(*order)
        if stored.scale is None:
            return self.value(Stored(stored.values.reshape(*shape)), name)
        value = self.value(stored, name)
        return value if tuple(shape) == stored.values.shape else self.reshape(value, shape)

    def scaled(self, value: str, scale: Tensor) -> str:
        return self.add("Mul", value, self.graph.constant(scale.to(self.work), "scale"))

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        return self.graph.reshape(value, shape)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; raises `UnsupportedError` where the model's opset is too old for it."""
        if self.opset < OPSETS.get(op, 0):
            raise UnsupportedError(
                f"small weights are written with {op} of opset {OPSETS[op]}, and the model is of opset {self.opset}",
                hint="Bring it to a newer one with onnx.version_converter",
            )
        return self.graph.add(op, *inputs, **attributes)

    def zeros(self, shape: Sequence[int]) -> str:
        return self.graph.add(
            "Expand", self.graph.constant(torch.zeros(1, dtype=self.work), "zero"), self.graph.ints(shape)
        )

    def product(self, factors: Sequence[Stored]) -> str:
        """(gates, rank, P_f, Q_f) each -> (gates, rows, cols), the products summed over the rank.

        With A the product of all factors but the last, B, and both flattened, sum_r A_r (x) B_r is one MatMul over the
        rank and a permutation (Van Loan and Pitsianis 1993).
        """
        if len(factors) == 1:
            factors = [*factors, Stored(torch.ones(1, factors[0].values.shape[1], 1, 1))]
        first, *middle, last = factors
        gates, rank, p, q = first.values.shape
        s, t = last.values.shape[2:]
        if not middle:
            left = self._merged(first.permute(0, 2, 3, 1), 1)
        else:
            left = self.value(first)
            for factor in middle:
                b, _, m, n = factor.values.shape
                pair = (left, (gates, rank, p, 1, q, 1)), (self.value(factor), (b, rank, 1, m, 1, n))
                left = self.add("Mul", *(self.reshape(value, shape) for value, shape in pair))
                p, q = p * m, q * n
                left = self.reshape(left, (gates, rank, p, q))
            left = self.graph.add("Transpose", self.reshape(left, (gates, rank, p * q)), perm=[0, 2, 1])
        product = self.graph.add("MatMul", left, self._merged(last, 2))  # (gates, p * q, s * t)
        if q == s == 1:
            return product
        product = self.reshape(product, (gates, p, q, s, t))
        product = self.graph.add("Transpose", product, perm=[0, 1, 3, 2, 4])
        return self.reshape(product, (gates, p * s, q * t))

    def _merged(self, stored: Stored, dim: int) -> str:
        """The value with the dimensions `dim` and `dim + 1` as one."""
        shape = stored.values.shape
        for one in (dim, dim + 1):
            if shape[one] == 1:
                return self.value(stored.squeeze(one))
        return self.reshape(self.value(stored), (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]))

    def _placed(self, part: str, gates: Sequence[int], size: tuple[int, int, int]) -> str:
        """(number of gates, rows, cols) as (all gates, rows, cols), zero elsewhere."""
        if len(gates) == size[0]:
            return part
        index = self.graph.constant(torch.tensor(gates)[:, None], "gates")
        return self.add("ScatterND", self.zeros(size), index, part)

    def _diagonal(self, diagonal: Tensor, gates: Sequence[int], size: tuple[int, int, int]) -> str:
        values = torch.zeros(*size[:2], 1, dtype=diagonal.dtype)
        values[list(gates), : diagonal.shape[1], 0] = diagonal
        eye = self.add("EyeLike", self.zeros(size[1:]), dtype=ELEMENTS[self.work])
        return self.add("Mul", eye, self.value(Stored(values)))

    def _sparse(self, entries: Mapping[str, Tensor], places: Sequence[int], size: tuple[int, int, int]) -> str:
        """Blocks of several rows of one column; of the place of each the distance from that before it is stored."""
        values, counts = entries["overlay.values"], entries["overlay.counts"].long()
        height, strips = values.shape[1], len(counts) // len(places)
        strip = torch.arange(len(counts)).repeat_interleave(counts)
        strip = torch.tensor(places)[strip // strips] * strips + strip % strips
        cell = strip * size[2] + entries["overlay.columns"].long()
        cell, order = cell.sort()
        gaps = cell.diff(prepend=cell.new_zeros(1))
        for dtype, most in ((torch.uint8, 1 << 8), (torch.uint16, 1 << 16), (torch.int32, 1 << 31)):
            if int(gaps.max()) < most:
                gaps = gaps.to(dtype)
                break
        cells = self.add("Cast", self.graph.constant(gaps, "gaps"), to=ELEMENTS[torch.int64])
        cells = self.add("CumSum", cells, self.graph.constant(torch.tensor(0), "axis"))
        blocks = self.zeros((len(counts) * size[2], height))
        blocks = self.add("ScatterND", blocks, self.reshape(cells, (-1, 1)), self.value(Stored(values[order])))
        blocks = self.reshape(blocks, (len(counts), size[2], height))
        scale = entries.get(f"overlay.values{SCALE}")
        if scale is not None:  # one for the blocks of a strip
            gates = sorted(range(len(places)), key=places.__getitem__)
            blocks = self.scaled(blocks, scale[strips_of(gates, strips)][:, :, None])
        return self.reshape(self.graph.add("Transpose", blocks, perm=[0, 2, 1]), size)


def strips_of(gates: Sequence[int], strips: int) -> Tensor:
    """Index of the strips of each of these gates, of which each has so many."""
    return torch.cat([torch.arange(gate * strips, (gate + 1) * strips) for gate in gates])


def take(stored: Stored, gates: Sequence[int]) -> Stored:
    """The parts along the first dimension at these places; what all have in common is one."""
    values, scale = stored
    return Stored(values[list(gates)], scale if scale is None or len(scale) < len(values) else scale[list(gates)])


def _one_gate(stored: Stored) -> Stored:
    """(gates, rank, P, Q) as (1, rank, gates * P, Q)."""
    return Stored(*(None if t is None else t.transpose(0, 1).flatten(1, 2)[None] for t in stored))  # type: ignore[arg-type]


def _scaled(factor: Stored, scale: Tensor | None) -> Stored:
    """A factor times the scale (gates, rank) of its term."""
    if scale is None:
        return factor
    scale = scale[:, :, None, None].float() if factor.values.dtype != torch.float64 else scale[:, :, None, None]
    if factor.scale is None and factor.values.dtype.itemsize >= 4:
        return Stored(factor.values * scale)
    return Stored(factor.values, scale if factor.scale is None else factor.scale * scale)
