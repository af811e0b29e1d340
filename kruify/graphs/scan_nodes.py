"""A recurrent node of a user's graph as a Scan in its place, with all of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from kruify.checkpoint.gates import GATES
from kruify.checkpoint.onnx_file import INPUTS, OnnxFile, unlike_torch
from kruify.checkpoint.onnx_in_place import Made
from kruify.factors import Structure
from kruify.graphs.contents import Contents, weight_names
from kruify.graphs.folded import ELEMENTS, Folder
from kruify.graphs.nodes import Graph
from kruify.graphs.scan import Cell, Padding, scan, sizes

OPSET = 13
"""From which on axes and sizes are inputs of the operators, as they are written here."""
X, LENGTHS, STATES = 0, 4, (5, 6)
"""Places of a node's inputs that are no weights."""


def refusal(found: OnnxFile, layer: str, structures: Mapping[str, Sequence[Structure]]) -> str | None:
    """Why a recurrent node is not written as a Scan, None where it can be."""
    weights, options = found.weights[layer], found.hints[layer].options
    node, recurrent = weights["W"].node, weight_names(found, layer, "R")
    if not all(name in structures for name in recurrent):
        return "its recurrent matrices are dense"
    factored = [s for name in (*weight_names(found, layer, "W"), *recurrent) for s in structures.get(name, ())]
    if any(s.sparse_blocks for s in factored):
        return "single entries beside the products take longer step by step than the dense node"
    if node.scope.opset < OPSET:
        return f"the model is of opset {node.scope.opset}, and a Scan is written with {OPSET} and later"
    if weights["W"].constant.tensor.dtype != torch.float32:
        return "it does not compute in float32"
    if node.scope.root.around is not None:
        return "it stands in a function of the model"
    if options["batch_first"]:
        return "its batch is in front of its steps (layout=1)"
    for other, parts in found.weights.items():
        if other != layer and any(
            parts[p].constant.tensor.identity == weights[p].constant.tensor.identity for p in "WR"
        ):
            return f"it shares weights with {other}"
    inputs = list(node.proto.input)
    return unlike_torch(str(options["mode"]).lower(), node.attributes, inputs, 1 + bool(options["bidirectional"]))


def scan_nodes(found: OnnxFile, layer: str, contents: Contents, fresh: Callable[[str], str]) -> Made:
    """What computes the outputs of a node, which may be read as they were, from all of its inputs but W and R.

    Args:
        fresh: stem -> a name that no value of the model has.
    """
    node = found.weights[layer]["W"].node
    inputs, outputs = ([*names, *[""] * 7] for names in (node.proto.input, node.proto.output))
    data, lengths, bias = inputs[X], inputs[LENGTHS], inputs[INPUTS["B"]]
    graph = Graph(fresh=lambda stem: fresh(f"{node.path}/{stem}"))
    folder = Folder(graph, node.scope.opset, torch.float32)
    padding = None
    if lengths:
        padding = Padding.of(graph, data, graph.add("Cast", lengths, to=ELEMENTS[torch.int64]))
    ih, hh = (weight_names(found, layer, part) for part in "WR")
    backward = "direction" in node.attributes and node.attributes["direction"].s == b"reverse"
    given = [inputs[place] for place in STATES[: 2 if node.proto.op_type == "LSTM" else 1]]
    zero = "" if padding is None and all(given) else _zero(graph, data, int(found.hints[layer].options["hidden_size"]))
    parts: list[list[str]] = [[], [], []]
    for d, pair in enumerate(zip(ih, hh, strict=True)):
        at = graph.scalar(d)
        cell = _cell(found, layer, contents, pair, bias and graph.add("Gather", bias, at, axis=0), graph)
        states = [graph.add("Gather", name, at, axis=0) if name else zero for name in given]
        y, ends = scan(
            folder, cell, data, states, padding, reverse=backward or d == 1,
            output=bool(outputs[0]), finals=[bool(name) for name in outputs[1:]],
        )  # fmt: skip
        if padding is not None:  # onnxruntime's nodes give zeros for a sequence of no steps
            y = y and padding.masked(graph, y, folder.work)
            ends = [graph.add("Where", padding.empty, zero, end) for end in ends]
        for values, value in zip(parts, [y, *ends], strict=False):
            values.append(value)
    for name, values, axis in zip(outputs, parts, (1, 0, 0), strict=False):
        if name:
            graph.rename(graph.concat([graph.add("Unsqueeze", v, graph.ints((axis,))) for v in values], axis), name)
    return Made(list(graph.constants.values()), graph.nodes)


def _zero(graph: Graph, data: str, hidden: int) -> str:
    """A state (batch, hidden) where none is given."""
    shape = graph.concat([sizes(graph, data)[1], graph.ints((hidden,))], axis=0)
    return graph.add("Expand", graph.constant(torch.zeros(1), "zero"), shape)


def _cell(found: OnnxFile, layer: str, contents: Contents, names: tuple[str, str], bias: str, graph: Graph) -> Cell:
    """One direction.

    Args:
        names: of its W_ih and W_hh.
        bias: value (2 * gates * hidden,), "" where there is none.
    """
    attributes, options = found.weights[layer]["W"].node.attributes, found.hints[layer].options
    kind, hidden = str(options["mode"]).lower(), int(options["hidden_size"])
    resets_first = kind == "gru" and not ("linear_before_reset" in attributes and attributes["linear_before_reset"].i)
    total = new = None
    if bias and kind == "gru" and not resets_first:
        x_zr, x_n, h_zr, new = graph.split(bias, (2 * hidden, hidden, 2 * hidden, hidden))
        total = graph.concat([graph.add("Add", x_zr, h_zr), x_n], axis=0)
    elif bias:
        total = graph.sum(graph.split(bias, (GATES[kind] * hidden,) * 2))
    return Cell(
        kind,
        hidden,
        contents.held(names[0]),
        contents.held(names[1]),
        "weight_{}",
        total,
        new,
        relu=options.get("nonlinearity") == "relu",
        resets_first=resets_first,
    )
