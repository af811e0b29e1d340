"""A recurrent layer as ONNX: a Scan whose body holds the factors, or ONNX's own LSTM, GRU or RNN node, densified.

Factored matrices never appear in full. What does not depend on the state (W_ih x and the biases) is computed for all
steps at once, outside the Scan.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from kruify.exporting.graph import make_model, scan_body
from kruify.exporting.matrix import product
from kruify.exporting.shapes import LENGTHS, Interface
from kruify.graphs.nodes import Graph
from kruify.layers.matrix import KroneckerMatrix

# The order that lets one Sigmoid serve neighbouring gates (LSTM: i, f, o then g).
GATE_ORDER = {"rnn": (0,), "lstm": (0, 1, 3, 2), "gru": (0, 1, 2)}
# torch's order -> ONNX's (LSTM: i, o, f, c; GRU: z, r, h).
NODE_ORDER = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


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
        _write_cell(graph, interface, weights[0])
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


def _write_cell(graph: Graph, interface: Interface, w: _Weights) -> None:
    gates_x = _input_gates(graph, interface.layer.kind, w, "input")
    state = _step(graph, interface, w, gates_x, interface.inputs[1:])
    for value, name in zip(state, interface.outputs, strict=True):
        graph.rename(value, name)


def _write_layer(graph: Graph, interface: Interface, weights: Sequence[_Weights], dtype: str) -> None:
    layer = interface.layer
    data = graph.add("Transpose", "input", perm=[1, 0, 2]) if layer.batch_first else "input"
    padding = _Padding.of(graph, data)
    finals: list[list[str]] = []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(interface.directions):
            index = k * interface.directions + d
            states = [graph.add("Gather", name, _scalar(graph, index), axis=0) for name in interface.inputs[1:]]
            node = isinstance(weights[index].ih, Tensor) and isinstance(weights[index].hh, Tensor)
            # onnxruntime has no double precision in its recurrent nodes, and no projection.
            write = _write_node if node and not layer.proj_size and dtype == "float32" else _write_scan
            output, final = write(graph, interface, weights[index], data, states, padding, reverse=d == 1, dtype=dtype)
            outputs.append(output)
            finals.append([graph.add("Where", padding.empty, *pair) for pair in zip(states, final, strict=True)])
        data = graph.concat(outputs, axis=2)
    zero = graph.constant(torch.zeros((), dtype=getattr(torch, dtype)), "padding")
    data = graph.add("Where", padding.inside, data, zero)
    if layer.batch_first:
        data = graph.add("Transpose", data, perm=[1, 0, 2])
    graph.rename(data, "output")
    for place, name in enumerate(interface.outputs[1:]):
        rows = [graph.add("Unsqueeze", final[place], graph.ints((0,))) for final in finals]
        graph.rename(graph.concat(rows, axis=0), name)


@dataclass(frozen=True)
class _Padding:
    """Which steps of a batch count: names of values that are computed once."""

    lengths: str  # (batch,), int64
    inside: str  # (time, batch, 1), whether a step counts
    empty: str  # (batch, 1), whether no step counts
    last: str  # (batch, 2), the last step of each sequence and the sequence: indices of GatherND

    @staticmethod
    def of(graph: Graph, data: str) -> _Padding:
        """From the input `lengths`, which stands for all steps where it is left out."""
        given = graph.constant(torch.full((1,), -1, dtype=torch.int64), LENGTHS)
        shape = graph.add("Shape", data)
        steps, batch = (graph.add("Slice", shape, graph.ints((at,)), graph.ints((at + 1,))) for at in (0, 1))
        lengths = graph.add("Where", graph.add("Less", given, graph.ints((0,))), steps, given)
        lengths = graph.add("Expand", lengths, batch)
        one, axis = _scalar(graph, 1), graph.ints((1,))
        steps, batch = (
            graph.add("Range", _scalar(graph, 0), graph.add("Squeeze", size, graph.ints((0,))), one)
            for size in (steps, batch)
        )
        column = graph.add("Unsqueeze", lengths, axis)
        inside = graph.add("Less", graph.add("Unsqueeze", steps, graph.ints((1, 2))), column)
        empty = graph.add("Equal", column, graph.ints((0,)))
        pairs = [graph.add("Unsqueeze", value, axis) for value in (graph.add("Sub", lengths, one), batch)]
        return _Padding(lengths, inside, empty, graph.concat(pairs, axis=1))


def _write_scan(
    graph: Graph,
    interface: Interface,
    w: _Weights,
    data: str,  # (time, batch, features)
    states: Sequence[str],  # each (batch, size)
    padding: _Padding,
    *,
    reverse: bool,
    dtype: str,
) -> tuple[str, list[str]]:
    layer = interface.layer
    wide = len(layer.gates) * layer.hidden_size
    features = w.ih.shape[1]
    flat = graph.reshape(data, (-1, features))
    gates_x = _input_gates(graph, layer.kind, w, flat)
    # The sizes of time and batch come from the data, so that an empty batch is no special case.
    leading = graph.add("Slice", graph.add("Shape", data), graph.ints((0,)), graph.ints((2,)))
    gates_x = graph.add("Reshape", gates_x, graph.concat([leading, graph.ints((wide,))], axis=0))
    if reverse:  # each sequence from its own last step on
        gates_x = graph.add("ReverseSequence", gates_x, padding.lengths, time_axis=0, batch_axis=1)

    body = Graph(graph)
    gate_in = body.fresh("gates")
    state_in = [body.fresh(f"{s}_in") for s in interface.states]
    state_out = [body.fresh(f"{s}_out") for s in interface.states]
    sequence_out = [body.fresh(f"{s}_step") for s in interface.states]
    for value, name in zip(_step(body, interface, w, gate_in, state_in), state_out, strict=True):
        body.rename(value, name)
    for value, name in zip(state_out, sequence_out, strict=True):
        body.rename(value, name)
    proto = scan_body(body, dtype, [*state_in, gate_in], [*state_out, *sequence_out])
    results = graph.add_many(
        "Scan",
        *states,
        gates_x,
        outputs=[graph.fresh(f"{s}_{part}") for part in ("end", "sequence") for s in interface.states],
        body=proto,
        num_scan_inputs=1,
    )
    sequences = results[len(states) :]
    final = [graph.add("GatherND", sequence, padding.last) for sequence in sequences]
    output = sequences[0]
    if reverse:
        output = graph.add("ReverseSequence", output, padding.lengths, time_axis=0, batch_axis=1)
    return output, final


def _input_gates(graph: Graph, kind: str, w: _Weights, x: str) -> str:
    """W_ih x and every bias that need not wait for the state: (n, features) -> (n, gates * hidden)."""
    order = GATE_ORDER[kind]
    y = product(graph, w.ih, x, order, w.name.format("ih"))
    if w.b_ih is None or w.b_hh is None:
        return y
    hidden = w.b_ih.shape[0] // len(order)
    late = w.b_hh.clone()
    if kind == "gru":  # b_hn stands inside r * (...): see _step
        late[2 * hidden :] = 0
    return graph.add("Add", y, graph.constant(_ordered(w.b_ih + late, order), w.name.format("bias")))


def _step(graph: Graph, interface: Interface, w: _Weights, gates_x: str, state: Sequence[str]) -> list[str]:
    """One step in time: gates_x (batch, gates * hidden), each state (batch, size) -> the next state."""
    kind, hidden = interface.layer.kind, interface.layer.hidden_size
    y = product(graph, w.hh, state[0], GATE_ORDER[kind], w.name.format("hh"))
    if kind == "rnn":
        total = graph.add("Add", gates_x, y)
        return [graph.add("Relu" if interface.layer.nonlinearity == "relu" else "Tanh", total)]
    if kind == "gru":
        x_rz, x_n = graph.split(gates_x, (2 * hidden, hidden))
        h_rz, h_n = graph.split(y, (2 * hidden, hidden))
        if w.b_hh is not None:
            h_n = graph.add("Add", h_n, graph.constant(w.b_hh[2 * hidden :], w.name.format("bias_hn")))
        r, z = graph.split(graph.add("Sigmoid", graph.add("Add", x_rz, h_rz)), (hidden, hidden))
        n = graph.add("Tanh", graph.add("Add", x_n, graph.add("Mul", r, h_n)))
        return [graph.add("Add", n, graph.add("Mul", z, graph.add("Sub", state[0], n)))]
    sigmoid, tanh = graph.split(graph.add("Add", gates_x, y), (3 * hidden, hidden))
    i, f, o = graph.split(graph.add("Sigmoid", sigmoid), (hidden,) * 3)
    g = graph.add("Tanh", tanh)
    c = graph.add("Add", graph.add("Mul", f, state[1]), graph.add("Mul", i, g))
    h = graph.add("Mul", o, graph.add("Tanh", c))
    if w.hr is not None:
        h = graph.add("MatMul", h, graph.constant(w.hr.mT, w.name.format("hr")))
    return [h, c]


def _write_node(
    graph: Graph,
    interface: Interface,
    w: _Weights,
    data: str,
    states: Sequence[str],
    padding: _Padding,
    *,
    reverse: bool,
    dtype: str,
) -> tuple[str, list[str]]:
    """ONNX's own LSTM, GRU or RNN, one layer and direction."""
    layer = interface.layer
    assert isinstance(w.ih, Tensor) and isinstance(w.hh, Tensor)
    order = NODE_ORDER[layer.kind]
    inputs = [data]
    for weight, label in ((w.ih, "ih"), (w.hh, "hh")):
        inputs.append(graph.constant(_ordered(weight, order).unsqueeze(0), w.name.format(label)))
    if w.b_ih is not None and w.b_hh is not None:
        bias = torch.cat([_ordered(w.b_ih, order), _ordered(w.b_hh, order)])
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


def _ordered(value: Tensor, order: Sequence[int]) -> Tensor:
    """Stacked gates in another order."""
    return torch.cat([value.chunk(len(order))[gate] for gate in order])


def _scalar(graph: Graph, index: int) -> str:
    name = f"index_{index}"
    if name not in graph.constants:
        graph.constants[name] = onnx.numpy_helper.from_array(torch.tensor(index).numpy(), name)
    return name
