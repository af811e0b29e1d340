"""A recurrent layer as ONNX: a Scan whose body holds the factors (`graphs.scan`), or ONNX's own LSTM, GRU or RNN node,
densified."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from kruify.checkpoint.gates import from_torch
from kruify.checkpoint.stored import encode
from kruify.exporting.graph import OPSET, make_model
from kruify.exporting.shapes import LENGTHS, Interface
from kruify.graphs.folded import Folder, Matrix, Stored
from kruify.graphs.nodes import Graph
from kruify.graphs.scan import Cell, Padding, input_gates, scan, sizes, step
from kruify.layers.matrix import KroneckerMatrix


@dataclass(frozen=True)
class _Weights:
    """One layer and direction."""

    name: str
    ih: KroneckerMatrix | Tensor
    hh: KroneckerMatrix | Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None


def layer_model(module: nn.Module, interface: Interface, *, dense: bool = False) -> onnx.ModelProto:
    """The ONNX model of one recurrent layer or cell, KRU or torch.nn's.

    A layer has one more input, `lengths` (batch,): how many steps of each sequence count, as in a packed sequence of
    torch: what follows neither changes the states nor reaches the backward direction, and its output is 0. A sequence
    of no steps leaves its states as they are. The input may be left out; below 0 stands for all steps, too.

    Args:
        dense: write ONNX's own recurrent nodes, with dense weights. Layers with a projection, which those nodes do not
            know, cells and float64 get MatMuls with dense weights.
    """
    layer = interface.layer
    dtype = "float64" if layer.dtype == "float64" else "float32"
    graph = Graph()
    weights = [_weights(module, layer.full_name("")[:-1], s, dtype, dense) for s in layer.suffixes]
    if interface.cell:
        _write_cell(graph, interface, weights[0], getattr(torch, dtype))
    else:
        _write_layer(graph, interface, weights, dtype)
    about = {
        "kruify.layer": layer.name,
        "kruify.kind": layer.kind,
        "kruify.factors": "; ".join(_factors(w) for w in weights),
    }
    return make_model(
        graph,
        dtype,
        list(zip(interface.inputs, interface.input_shapes("time", "batch"), strict=True)),
        list(zip(interface.outputs, interface.output_shapes("time", "batch"), strict=True)),
        about,
        optional=[] if interface.cell else [(LENGTHS, ["batch"])],
    )


def _weights(module: nn.Module, prefix: str, suffix: str, dtype: str, dense: bool) -> _Weights:
    target = getattr(torch, dtype)

    def get(stem: str) -> Any:
        value = getattr(module, stem + suffix, None)
        if isinstance(value, KroneckerMatrix):
            value = copy.deepcopy(value)  # nn.Module.to works in place
            if not dense:
                return value.to(target)
            value = value.to(torch.float64).to_dense()
        if not isinstance(value, Tensor):
            return None
        return value.detach().to(target)

    name = f"{prefix}.weight_{{}}{suffix}" if prefix else f"weight_{{}}{suffix}"
    return _Weights(name, *map(get, ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")))


def _factors(weights: _Weights) -> str:
    parts = []
    for label, weight in (("ih", weights.ih), ("hh", weights.hh)):
        text = "dense" if isinstance(weight, Tensor) else ", ".join(map(str, weight.structures))
        parts.append(f"{weights.name.format(label)}: {text}")
    return "; ".join(parts)


def _cell(graph: Graph, interface: Interface, w: _Weights) -> Cell:
    kind, hidden = interface.layer.kind, interface.layer.hidden_size
    bias = late = None
    if w.b_ih is not None and w.b_hh is not None:
        early = w.b_hh.clone()
        if kind == "gru":  # b_hn stands inside r * (...)
            early[2 * hidden :] = 0
            late = graph.constant(w.b_hh[2 * hidden :], w.name.format("bias_hn"))
        bias = graph.constant(from_torch(w.b_ih + early, "onnx", kind), w.name.format("bias"))
    return Cell(
        kind,
        hidden,
        _stored(w.ih),
        _stored(w.hh),
        w.name,
        bias,
        late,
        relu=interface.layer.nonlinearity == "relu",
        projection=None if w.hr is None else graph.constant(w.hr.mT, w.name.format("hr")),
    )


def _stored(weight: KroneckerMatrix | Tensor) -> Matrix | Stored:
    if isinstance(weight, Tensor):
        return Stored(weight)
    parts = dict(zip(("diagonal", "overlay.values", "overlay.index"), weight.parts_beside_terms(), strict=True))
    for number, term in enumerate(weight.term_list()):
        factors, parts[f"terms.{number}.scale"] = term.held()
        parts |= {f"terms.{number}.factors.{f}": factor for f, factor in enumerate(factors)}
    given = {f"matrix.{name}": tensor.detach() for name, tensor in parts.items() if tensor is not None}
    stored = encode(given, {}, {"matrix": (weight.shape[0], weight.shape[1])})
    return Matrix(weight.structures, {name.removeprefix("matrix."): t.load() for name, t in stored.items()})


def _write_cell(graph: Graph, interface: Interface, w: _Weights, dtype: torch.dtype) -> None:
    folder, cell = Folder(graph, OPSET, dtype), _cell(graph, interface, w)
    state = step(graph, folder, cell, input_gates(folder, cell, "input"), interface.inputs[1:])
    for value, name in zip(state, interface.outputs, strict=True):
        graph.rename(value, name)


def _write_layer(graph: Graph, interface: Interface, weights: Sequence[_Weights], dtype: str) -> None:
    layer = interface.layer
    data = graph.add("Transpose", "input", perm=[1, 0, 2]) if layer.batch_first else "input"
    padding, work = _padding(graph, data), getattr(torch, dtype)
    finals: list[list[str]] = []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(interface.directions):
            index = k * interface.directions + d
            states = [graph.add("Gather", name, graph.scalar(index), axis=0) for name in interface.inputs[1:]]
            w, reverse = weights[index], d == 1
            # onnxruntime has no double precision in its recurrent nodes, and no projection.
            if isinstance(w.ih, Tensor) and isinstance(w.hh, Tensor) and not layer.proj_size and dtype == "float32":
                output, final = _write_node(graph, interface, w, data, states, padding, reverse=reverse)
            else:
                folder = Folder(graph, OPSET, work)
                output, final = scan(folder, _cell(graph, interface, w), data, states, padding, reverse=reverse)
            outputs.append(output)
            finals.append([graph.add("Where", padding.empty, *pair) for pair in zip(states, final, strict=True)])
        data = graph.concat(outputs, axis=2)
    data = padding.masked(graph, data, work)
    if layer.batch_first:
        data = graph.add("Transpose", data, perm=[1, 0, 2])
    graph.rename(data, "output")
    for place, name in enumerate(interface.outputs[1:]):
        rows = [graph.add("Unsqueeze", final[place], graph.ints((0,))) for final in finals]
        graph.rename(graph.concat(rows, axis=0), name)


def _padding(graph: Graph, data: str) -> Padding:
    """From the input `lengths`, which stands for all steps where it is left out."""
    given = graph.constant(torch.full((1,), -1, dtype=torch.int64), LENGTHS)
    steps, batch = sizes(graph, data)
    lengths = graph.add("Where", graph.add("Less", given, graph.ints((0,))), steps, given)
    return Padding.of(graph, data, graph.add("Expand", lengths, batch))


def _write_node(
    graph: Graph,
    interface: Interface,
    w: _Weights,
    data: str,
    states: Sequence[str],
    padding: Padding,
    *,
    reverse: bool,
) -> tuple[str, list[str]]:
    """ONNX's own LSTM, GRU or RNN, one layer and direction."""
    layer = interface.layer
    assert isinstance(w.ih, Tensor) and isinstance(w.hh, Tensor)
    inputs = [data]
    for weight, label in ((w.ih, "ih"), (w.hh, "hh")):
        inputs.append(graph.constant(from_torch(weight, "onnx", layer.kind).unsqueeze(0), w.name.format(label)))
    if w.b_ih is not None and w.b_hh is not None:
        bias = torch.cat([from_torch(bias, "onnx", layer.kind) for bias in (w.b_ih, w.b_hh)])
        inputs.append(graph.constant(bias.unsqueeze(0), w.name.format("bias")))
    else:
        inputs.append("")
    inputs += [
        graph.add("Cast", padding.lengths, to=onnx.TensorProto.INT32),
        *(graph.add("Unsqueeze", state, graph.ints((0,))) for state in states),
    ]
    attributes: dict[str, Any] = {"hidden_size": layer.hidden_size, "direction": "reverse" if reverse else "forward"}
    if layer.kind == "gru":
        attributes["linear_before_reset"] = 1  # torch multiplies before it resets
    if layer.kind == "rnn":
        attributes["activations"] = ["Relu" if layer.nonlinearity == "relu" else "Tanh"]
    names = [graph.fresh("sequence"), *(graph.fresh(f"{s}_last") for s in interface.states)]
    graph.add_many(layer.kind.upper(), *inputs, outputs=names, **attributes)
    output = graph.add("Squeeze", names[0], graph.ints((1,)))  # (time, directions, batch, hidden)
    return output, [graph.add("Squeeze", name, graph.ints((0,))) for name in names[1:]]
