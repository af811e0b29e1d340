"""A Kronecker matrix as ONNX nodes: small MatMuls, never the dense matrix.

With x seen as a tensor (batch, Q_0, Q_1, ...), factor f multiplies mode f. The first factor applied serves all gates
and terms with one MatMul; the last one sums over the terms inside its MatMul where its mode is the leading one, which
it is for the usual order (last factor first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kruify.graphs.nodes import Graph
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm, SparseResidual

Gates = Sequence[int]  # the gates in the order in which they are to come out


def product(
    graph: Graph,
    weight: KroneckerMatrix | Tensor,
    x: str,  # (n, cols)
    gates: Gates,
    name: str,
) -> str:  # (n, gates * rows)
    """x @ W.T, the gates in the order wanted."""
    if isinstance(weight, Tensor):
        rows = weight.shape[0] // len(gates)
        ordered = torch.cat([weight[g * rows : (g + 1) * rows] for g in gates])
        return graph.add("MatMul", x, graph.constant(ordered.mT, name))
    parts = _terms(graph, weight, x, gates, name)
    if weight.diagonal is not None:
        parts.append(_diagonal(graph, weight, x, gates, name))
    if weight.overlay is not None:
        parts.append(_overlay(graph, weight, weight.overlay, x, gates, name))
    return graph.sum(parts)


def _terms(graph: Graph, weight: KroneckerMatrix, x: str, gates: Gates, name: str) -> list[str]:
    """One value (n, gates * rows) a term; terms that not all gates have are put together gate by gate."""
    whole: list[str] = []
    by_gate: dict[int, list[str]] = {gate: [] for gate in gates}
    for number, term in enumerate(weight.term_list()):
        order = [term.gates.index(gate) for gate in gates if gate in term.gates]
        y = _term(graph, term, x, order, f"{name}.terms.{number}")  # (n, gates of the term, rows)
        if len(order) == len(gates):
            whole.append(graph.reshape(y, (0, len(gates) * weight.rows)))
            continue
        parts = graph.split(y, [1] * len(order), axis=1) if len(order) > 1 else [y]
        for place, part in zip(order, parts, strict=True):
            by_gate[term.gates[place]].append(graph.reshape(part, (0, weight.rows)))
    if not any(by_gate.values()):
        return whole
    zero = ""
    if not all(by_gate.values()):
        total = graph.add("ReduceSum", x, graph.ints((1,)), keepdims=1)  # only to learn n
        nothing = graph.add("Mul", total, graph.constant(torch.zeros(1, dtype=weight.dtype), "zero"))
        zero = graph.add("Expand", nothing, graph.ints((1, weight.rows)))
    return [*whole, graph.concat([graph.sum(by_gate[gate] or [zero]) for gate in gates], axis=1)]


def _term(graph: Graph, term: KroneckerTerm, x: str, order: Sequence[int], name: str) -> str:
    """(n, cols) -> (n, gates, rows): one MatMul a factor."""
    factors = [factor.detach().expand(len(term.gates), -1, -1, -1)[list(order)] for factor in term.factors]
    if term.stacked and application_order(term.shapes) == [1, 0]:
        factors[1] = term.factors[1].detach()  # one for all gates
    if term.scale is not None:
        factors[0] = factors[0] * term.scale.detach()[list(order)][..., None, None]
    count, rank = factors[0].shape[:2]
    shapes = [(f.shape[2], f.shape[3]) for f in factors]
    sizes = [q for _, q in shapes]
    sequence = application_order(shapes)
    y = x
    for place, f in enumerate(sequence):
        (p, q), factor, label = shapes[f], factors[f], f"{name}.factors.{f}"
        m, s = math.prod(sizes[:f]), math.prod(sizes[f + 1 :])
        first, last = place == 0, place == len(sequence) - 1
        if first and last:  # the only factor: a sum of dense matrices
            flat = factor.sum(dim=1).reshape(count * p, q)
            return graph.reshape(graph.add("MatMul", y, graph.constant(flat.mT, label)), (0, count, p))
        if first:
            y = _first_factor(graph, y, factor, m, s, label)
        elif last:
            return _last_factor(graph, y, factor, m, s, label)
        else:
            y = graph.reshape(y, (0, count * rank, m, q, s))
            y = graph.add("MatMul", graph.constant(factor.reshape(count * rank, 1, p, q), label), y)
        sizes[f] = p
    raise AssertionError("a term has at least one factor")


def application_order(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """The cheapest order (see `kruify.factors.contraction_order`); between equals the last factor goes first."""
    return sorted(reversed(range(len(shapes))), key=lambda f: 1 / shapes[f][1] - 1 / shapes[f][0])


def _first_factor(graph: Graph, y: str, factor: Tensor, m: int, s: int, label: str) -> str:
    """(n, m * q * s) -> (n, gates * rank, m, p, s) up to reshaping: one MatMul for all gates and terms."""
    count, rank, p, q = factor.shape
    stacked = factor.reshape(count * rank * p, q)
    if s == 1:
        y = graph.add("MatMul", graph.reshape(y, (-1, q)), graph.constant(stacked.mT, label))
        if m == 1:
            return y
        return graph.add("Transpose", graph.reshape(y, (-1, m, count * rank, p)), perm=[0, 2, 1, 3])
    weight = graph.constant(stacked, label)
    if m == 1:
        return graph.add("MatMul", weight, graph.reshape(y, (0, q, s)))
    y = graph.add("MatMul", weight, graph.reshape(y, (0, m, q, s)))
    return graph.add("Transpose", graph.reshape(y, (0, m, count * rank, p * s)), perm=[0, 2, 1, 3])


def _last_factor(graph: Graph, y: str, factor: Tensor, m: int, s: int, label: str) -> str:
    """(n, gates * rank, m, q, s) up to reshaping -> (n, gates, m * p * s), summed over the terms. What came of a factor
    that gates share stands there once."""
    count, rank, p, q = factor.shape
    if m == 1:  # sum over rank and q at once: (gates, p, rank * q) times (n, gates or 1, rank * q, s)
        merged = factor.transpose(1, 2).reshape(count, p, rank * q)
        y = graph.add("MatMul", graph.constant(merged, label), graph.reshape(y, (0, -1, rank * q, s)))
        return graph.reshape(y, (0, count, p * s))
    y = graph.reshape(y, (0, count, rank, m, q, s) if s > 1 else (0, count, rank, m, q))
    if s > 1:
        y = graph.add("MatMul", graph.constant(factor.unsqueeze(2), label), y)
    else:
        y = graph.add("MatMul", y, graph.constant(factor.mT, label))
    if rank > 1:
        y = graph.add("ReduceSum", y, graph.ints((2,)), keepdims=0)
    return graph.reshape(y, (0, count, m * p * s))


def _diagonal(graph: Graph, weight: KroneckerMatrix, x: str, gates: Gates, name: str) -> str:
    assert weight.diagonal is not None
    rows, cols = weight.rows, weight.cols
    n = min(rows, cols)
    values = weight.diagonal.new_zeros(len(gates), rows)
    for place, gate in enumerate(gates):
        if gate in weight.diagonal_gates:
            values[place, :n] = weight.diagonal.detach()[weight.diagonal_gates.index(gate)]
    if cols > n:
        x = graph.split(x, (n, cols - n))[0]
    elif rows > n:
        x = graph.add("Pad", x, graph.ints((0, 0, 0, rows - n)))
    y = graph.add("Mul", graph.reshape(x, (0, 1, rows)), graph.constant(values, f"{name}.diagonal"))
    return graph.reshape(y, (0, len(gates) * rows))


def _overlay(graph: Graph, weight: KroneckerMatrix, overlay: SparseResidual, x: str, gates: Gates, name: str) -> str:
    """Blocks of several rows of one column, padded to equally many in each row of blocks: Gather, then one MatMul."""
    height, strips = overlay.values.shape[1], weight.rows // overlay.values.shape[1]
    lines: list[list[tuple[int, Tensor]]] = [[] for _ in range(len(gates) * strips)]
    for (row, column), values in zip(overlay.index.tolist(), overlay.values.detach(), strict=True):
        gate, strip = divmod(row // height, strips)
        lines[list(gates).index(gate) * strips + strip].append((column, values))
    longest = max(map(len, lines))
    columns = torch.zeros(len(lines), longest, dtype=torch.int64)
    blocks = overlay.values.new_zeros(len(lines), longest, height)
    for line, entries in enumerate(lines):
        for place, (column, values) in enumerate(entries):
            columns[line, place], blocks[line, place] = column, values
    picked = graph.add("Gather", x, graph.constant(columns, f"{name}.overlay.index"), axis=1)
    picked = graph.reshape(picked, (0, len(lines), 1, longest))
    y = graph.add("MatMul", picked, graph.constant(blocks, f"{name}.overlay"))
    return graph.reshape(y, (0, len(lines) * height))
