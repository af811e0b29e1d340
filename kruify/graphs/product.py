"""The product with a Kronecker matrix as ONNX nodes: small MatMuls, never the dense matrix.

With x seen as a tensor (batch, Q_0, Q_1, ...), factor f multiplies mode f. The first factor applied serves all gates
and terms with one MatMul; the last one sums over the terms inside its MatMul where its mode is the leading one, which
it is for the usual order (last factor first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kruify.graphs.folded import Folder, Matrix, Stored, StoredTerm, strips_of, take
from kruify.graphs.nodes import Graph

Gates = Sequence[int]  # the gates in the order in which they are to come out, all or some


class Product:
    """Adds products with weights to a graph.

    Args:
        graph: takes the nodes that compute with x.
        folder: takes the constants, and the nodes that make them of what is stored.
    """

    def __init__(self, graph: Graph, folder: Folder) -> None:
        self.graph, self.folder = graph, folder

    def add(
        self,
        weight: Matrix | Stored,
        x: str,  # (n, cols)
        gates: Gates,
        name: str,
    ) -> str:  # (n, gates * rows)
        """x @ W.T, the gates in the order wanted.

        Args:
            weight: a dense one is (all gates * rows, cols), and all of its gates are wanted.
            name: what the constants are called.
        """
        if isinstance(weight, Stored):
            rows = strips_of(gates, len(weight.values) // len(gates))
            return self.graph.add("MatMul", x, self.folder.value(take(weight, rows.tolist()).permute(1, 0), name))
        parts = self._terms(weight, x, gates, name)
        if "diagonal" in weight.entries:
            parts.append(self._diagonal(weight, x, gates, name))
        if "overlay.values" in weight.entries:
            parts += self._overlay(weight, x, gates, name)
        return self.graph.sum(parts)

    def _terms(self, weight: Matrix, x: str, gates: Gates, name: str) -> list[str]:
        """One value (n, gates * rows) a term; terms that not all gates have are put together gate by gate."""
        graph = self.graph
        whole: list[str] = []
        by_gate: dict[int, list[str]] = {gate: [] for gate in gates}
        for number, term in enumerate(weight.terms()):
            order = [term.gates.index(gate) for gate in gates if gate in term.gates]
            if not order:
                continue
            y = self._term(term, order, x, f"{name}.terms.{number}")
            if len(order) == len(gates):
                whole.append(y)
                continue
            parts = graph.split(y, [weight.rows] * len(order), axis=1) if len(order) > 1 else [y]
            for place, part in zip(order, parts, strict=True):
                by_gate[term.gates[place]].append(part)
        if not any(by_gate.values()):
            return whole
        zero = ""
        if not all(by_gate.values()):
            total = graph.add("ReduceSum", x, graph.ints((1,)), keepdims=1)  # only to learn n
            nothing = graph.add("Mul", total, graph.constant(torch.zeros(1, dtype=self.folder.work), "zero"))
            zero = graph.add("Expand", nothing, graph.ints((1, weight.rows)))
        return [*whole, graph.concat([graph.sum(by_gate[gate] or [zero]) for gate in gates], axis=1)]

    def _term(self, term: StoredTerm, order: Sequence[int], x: str, name: str) -> str:
        """(n, cols) -> (n, gates * rows): one MatMul a factor."""
        factors, count = term.ordered(order), len(order)
        shapes = [(f.values.shape[2], f.values.shape[3]) for f in factors]
        sequence = application_order(shapes)
        for f, factor in enumerate(factors):  # what all gates share is applied once if it comes first
            if len(factor.values) < count and (len(factors) > 2 or sequence[0] != f):
                factors[f] = take(factor, [0] * count)
        rank, sizes, y = factors[0].values.shape[1], [q for _, q in shapes], x
        for place, f in enumerate(sequence):
            (p, q), factor, label = shapes[f], factors[f], f"{name}.factors.{f}"
            m, s = math.prod(sizes[:f]), math.prod(sizes[f + 1 :])
            first, last = place == 0, place == len(sequence) - 1
            if first and last:  # the only factor: a sum of dense matrices
                return self._dense(y, factor, label)
            if first:
                y = self._first_factor(y, factor, m, s, label)
            elif last:
                shared = len(factors[sequence[place - 1]].values) == 1
                return self._last_factor(y, factor, m, s, label, shared)
            else:
                y = self.graph.reshape(y, (0, count * rank, m, q, s))
                middle = self.folder.arranged(factor, (0, 1, 2, 3), (count * rank, 1, p, q), label)
                y = self.graph.add("MatMul", middle, y)
            sizes[f] = p
        raise AssertionError("a term has at least one factor")

    def _dense(self, y: str, factor: Stored, label: str) -> str:
        """(n, q) -> (n, gates * p), summed over the terms."""
        count, rank, p, q = factor.values.shape
        if rank == 1:
            return self.graph.add("MatMul", y, self.folder.arranged(factor, (3, 1, 0, 2), (q, count * p), label))
        summed = self.folder.reshape(self.folder.product([factor]), (count * p, q))
        return self.graph.add("MatMul", y, self.folder.add("Transpose", summed, perm=[1, 0]))

    def _first_factor(self, y: str, factor: Stored, m: int, s: int, label: str) -> str:
        """(n, m * q * s) -> (n, gates * rank, m, p, s) up to reshaping: one MatMul for all gates and terms."""
        graph = self.graph
        count, rank, p, q = factor.values.shape
        if s == 1:
            weight = self.folder.arranged(factor, (3, 0, 1, 2), (q, count * rank * p), label)
            y = graph.add("MatMul", graph.reshape(y, (-1, q)), weight)
            if m == 1:
                return y
            return graph.add("Transpose", graph.reshape(y, (-1, m, count * rank, p)), perm=[0, 2, 1, 3])
        weight = self.folder.arranged(factor, (0, 1, 2, 3), (count * rank * p, q), label)
        if m == 1:
            return graph.add("MatMul", weight, graph.reshape(y, (0, q, s)))
        y = graph.add("MatMul", weight, graph.reshape(y, (0, m, q, s)))
        return graph.add("Transpose", graph.reshape(y, (0, m, count * rank, p * s)), perm=[0, 2, 1, 3])

    def _last_factor(self, y: str, factor: Stored, m: int, s: int, label: str, shared: bool) -> str:
        """(n, gates * rank, m, q, s) up to reshaping -> (n, gates * m * p * s), summed over the terms; `shared` says
        that what comes in stands there once for all gates."""
        graph = self.graph
        count, rank, p, q = factor.values.shape
        if m == s == 1 and shared:  # low rank of stacked gates
            weight = self.folder.arranged(factor, (1, 3, 0, 2), (rank * q, count * p), label)
            return graph.add("MatMul", y if q == 1 else graph.reshape(y, (0, rank * q)), weight)
        if m == 1:  # sum over rank and q at once: (gates, p, rank * q) times (n, gates or 1, rank * q, s)
            merged = self.folder.arranged(factor, (0, 2, 1, 3), (count, p, rank * q), label)
            y = graph.add("MatMul", merged, graph.reshape(y, (0, -1, rank * q, s)))
            return graph.reshape(y, (0, count * p * s))
        y = graph.reshape(y, (0, count, rank, m, q, s) if s > 1 else (0, count, rank, m, q))
        if s > 1:
            y = graph.add("MatMul", self.folder.arranged(factor, (0, 1, 2, 3), (count, rank, 1, p, q), label), y)
        else:
            y = graph.add("MatMul", y, self.folder.arranged(factor, (0, 1, 3, 2), (count, rank, q, p), label))
        if rank > 1:
            y = graph.add("ReduceSum", y, graph.ints((2,)), keepdims=0)
        return graph.reshape(y, (0, count * m * p * s))

    def _diagonal(self, weight: Matrix, x: str, gates: Gates, name: str) -> str:
        graph, rows, cols, diagonal = self.graph, weight.rows, weight.cols, weight.entries["diagonal"]
        n = min(rows, cols)
        values = diagonal.new_zeros(len(gates), rows)
        for place, gate in enumerate(gates):
            if gate in weight.diagonal_gates:
                values[place, :n] = diagonal[weight.diagonal_gates.index(gate)]
        if cols > n:
            x = graph.split(x, (n, cols - n))[0]
        elif rows > n:
            x = graph.add("Pad", x, graph.ints((0, 0, 0, rows - n)))
        value = self.folder.value(Stored(values), f"{name}.diagonal")
        return graph.reshape(graph.add("Mul", graph.reshape(x, (0, 1, rows)), value), (0, len(gates) * rows))

    def _overlay(self, weight: Matrix, x: str, gates: Gates, name: str) -> list[str]:
        """Blocks of several rows of one column, padded to equally many in each row of blocks: Gather, then one MatMul.
        Their numbers have no scales here."""
        values, counts = weight.entries["overlay.values"], weight.entries["overlay.counts"].long()
        height = values.shape[1]
        lines = strips_of(gates, weight.rows // height)
        longest = int(counts[lines].max())
        if not longest:
            return []
        line = torch.arange(len(counts)).repeat_interleave(counts)
        place = torch.arange(len(line)) - (counts.cumsum(0) - counts)[line]
        columns = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
        blocks = values.new_zeros(*columns.shape, height)
        columns[line, place], blocks[line, place] = weight.entries["overlay.columns"].long(), values
        graph, index = self.graph, self.graph.constant(columns[lines, :longest], f"{name}.overlay.index")
        picked = graph.reshape(graph.add("Gather", x, index, axis=1), (0, len(lines), 1, longest))
        y = graph.add("MatMul", picked, self.folder.value(Stored(blocks[lines, :longest]), f"{name}.overlay"))
        return [graph.reshape(y, (0, len(lines) * height))]


def application_order(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """The cheapest order (see `kruify.factors.contraction_order`); between equals the last factor goes first."""
    return sorted(reversed(range(len(shapes))), key=lambda f: 1 / shapes[f][1] - 1 / shapes[f][0])
