"""A recurrent layer as a Scan over time whose body holds the factors.

Factored matrices never appear in full. What does not depend on the state (W_ih x and the biases) is computed for all
steps at once, outside the Scan. Gates stand in ONNX's order, in which those with a sigmoid are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kruify.checkpoint.gates import ORDER
from kruify.graphs.folded import ELEMENTS, Folder, Matrix, Stored
from kruify.graphs.nodes import Graph
from kruify.graphs.product import Product


@dataclass(frozen=True)
class Cell:
    """One layer and direction.

    Attributes:
        kind: "lstm", "gru" or "rnn".
        hidden: size of h, before a projection.
        ih, hh: (gates * hidden, cols), the gates in torch's order.
        name: of the constants, with {} for "ih" or "hh".
        bias: value (gates * hidden,) in ONNX's order: what is added before any state is known.
        bias_new: value (hidden,): of a GRU that resets after the matmul, what is added within r * (...).
        relu: of an RNN, in the place of tanh.
        resets_first: of a GRU, before the matmul.
        projection: value (hidden, size) of an LSTM, which ONNX's own node does not know.
    """

    kind: str
    hidden: int
    ih: Matrix | Stored
    hh: Matrix | Stored
    name: str
    bias: str | None = None
    bias_new: str | None = None
    relu: bool = False
    resets_first: bool = False
    projection: str | None = None

    @property
    def order(self) -> list[int]:
        """torch's gates in ONNX's order."""
        places = ORDER["onnx", self.kind]
        return sorted(range(len(places)), key=places.__getitem__)

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c") if self.kind == "lstm" else ("h",)

    @property
    def features(self) -> int:
        return self.ih.cols if isinstance(self.ih, Matrix) else self.ih.values.shape[1]


@dataclass(frozen=True)
class Padding:
    """Which steps of a batch count: names of values that are computed once."""

    lengths: str  # (batch,), int64
    inside: str  # (time, batch, 1), whether a step counts
    empty: str  # (batch, 1), whether no step counts
    last: str  # (batch, 2), the last step of each sequence and the sequence: indices of GatherND

    @staticmethod
    def of(graph: Graph, data: str, lengths: str) -> Padding:
        """Args: data: (time, batch, features); lengths: (batch,), int64."""
        one, axis = graph.scalar(1), graph.ints((1,))
        steps, batch = (
            graph.add("Range", graph.scalar(0), graph.add("Squeeze", size, graph.ints((0,))), one)
            for size in sizes(graph, data)
        )
        column = graph.add("Unsqueeze", lengths, axis)
        inside = graph.add("Less", graph.add("Unsqueeze", steps, graph.ints((1, 2))), column)
        empty = graph.add("Equal", column, graph.ints((0,)))
        pairs = [graph.add("Unsqueeze", value, axis) for value in (graph.add("Sub", lengths, one), batch)]
        return Padding(lengths, inside, empty, graph.concat(pairs, axis=1))

    def masked(self, graph: Graph, data: str, dtype: torch.dtype) -> str:
        """(time, batch, features) with 0 in the padding."""
        zero = graph.constant(torch.zeros((), dtype=dtype), "padding")
        return graph.add("Where", self.inside, data, zero)


def sizes(graph: Graph, data: str) -> tuple[str, str]:
    """Of time and batch, (1,) each."""
    shape = graph.add("Shape", data)
    steps, batch = (graph.add("Slice", shape, graph.ints((at,)), graph.ints((at + 1,))) for at in (0, 1))
    return steps, batch


def scan(
    folder: Folder,
    cell: Cell,
    data: str,  # (time, batch, features)
    states: Sequence[str],  # each (batch, size)
    padding: Padding | None,
    *,
    reverse: bool,
    output: bool = True,
    finals: Sequence[bool] = (True, True),
) -> tuple[str, list[str]]:
    """The states of all steps, (time, batch, size), and those at the ends of the sequences, (batch, size).

    Args:
        padding: None where every step counts.
        output, finals: what is needed, "" is returned for what is not. A sequence of no steps ends anywhere.
    """
    graph = folder.graph
    gates_x = input_gates(folder, cell, graph.reshape(data, (-1, cell.features)))
    # The sizes of time and batch come from the data, so that an empty batch is no special case.
    leading = graph.add("Slice", graph.add("Shape", data), graph.ints((0,)), graph.ints((2,)))
    wide = graph.ints((len(cell.order) * cell.hidden,))
    gates_x = graph.add("Reshape", gates_x, graph.concat([leading, wide], axis=0))
    if reverse and padding is not None:  # each sequence from its own last step on
        gates_x = graph.add("ReverseSequence", gates_x, padding.lengths, time_axis=0, batch_axis=1)
    padded = padding is not None
    kept = [s for s, final in zip(cell.states, finals, strict=False) if (s == "h" and output) or (padded and final)]

    body = Graph(graph)
    gate_in, state_in = body.fresh("gates"), [body.fresh(f"{s}_in") for s in cell.states]
    state_out = step(body, folder, cell, gate_in, state_in)
    step_out = [body.add("Identity", state_out[cell.states.index(s)], out=body.fresh(f"{s}_step")) for s in kept]
    backwards = {"scan_input_directions": [1]} | ({"scan_output_directions": [1] * len(kept)} if kept else {})
    results = graph.add_many(
        "Scan",
        *states,
        gates_x,
        outputs=[graph.fresh(f"{s}_end") for s in cell.states] + [graph.fresh(f"{s}_sequence") for s in kept],
        body=_body(body, folder.work, [*state_in, gate_in], [*state_out, *step_out]),
        num_scan_inputs=1,
        **(backwards if reverse and not padded else {}),
    )
    ends, sequences = results[: len(states)], dict(zip(kept, results[len(states) :], strict=True))
    if padding is not None:
        ends = [
            graph.add("GatherND", sequences[s], padding.last) if s in sequences else end
            for s, end in zip(cell.states, ends, strict=True)
        ]
    y = sequences["h"] if output else ""
    if output and reverse and padding is not None:
        y = graph.add("ReverseSequence", y, padding.lengths, time_axis=0, batch_axis=1)
    return y, ends


def input_gates(folder: Folder, cell: Cell, x: str) -> str:
    """W_ih x and every bias that need not wait for the state: (n, features) -> (n, gates * hidden)."""
    y = Product(folder.graph, folder).add(cell.ih, x, cell.order, cell.name.format("ih"))
    return y if cell.bias is None else folder.graph.add("Add", y, cell.bias)


def step(graph: Graph, folder: Folder, cell: Cell, gates_x: str, state: Sequence[str]) -> list[str]:
    """One step in time: gates_x (batch, gates * hidden), each state (batch, size) -> the next state.

    Args:
        graph: takes the nodes; the folder the constants.
    """
    hidden = cell.hidden

    def product(x: str, gates: Sequence[int]) -> str:
        return Product(graph, folder).add(cell.hh, x, gates, cell.name.format("hh"))

    if cell.kind == "rnn":
        total = graph.add("Add", gates_x, product(state[0], cell.order))
        return [graph.add("Relu" if cell.relu else "Tanh", total)]
    if cell.kind == "gru":
        return [_gru_step(graph, cell, gates_x, state[0], product)]
    sigmoid, tanh = graph.split(graph.add("Add", gates_x, product(state[0], cell.order)), (3 * hidden, hidden))
    i, o, f = graph.split(graph.add("Sigmoid", sigmoid), (hidden,) * 3)
    g = graph.add("Tanh", tanh)
    c = graph.add("Add", graph.add("Mul", f, state[1]), graph.add("Mul", i, g))
    h = graph.add("Mul", o, graph.add("Tanh", c))
    return [h if cell.projection is None else graph.add("MatMul", h, cell.projection), c]


def _gru_step(graph: Graph, cell: Cell, gates_x: str, h: str, product: Callable[[str, Sequence[int]], str]) -> str:
    sizes, (z_gate, r_gate, n_gate) = (2 * cell.hidden, cell.hidden), cell.order
    x_zr, x_n = graph.split(gates_x, sizes)
    if cell.resets_first:
        h_zr = product(h, (z_gate, r_gate))
    else:
        h_zr, h_n = graph.split(product(h, cell.order), sizes)
    z, r = graph.split(graph.add("Sigmoid", graph.add("Add", x_zr, h_zr)), (cell.hidden,) * 2)
    if cell.resets_first:
        late = product(graph.add("Mul", r, h), (n_gate,))
    else:
        late = graph.add("Mul", r, h_n if cell.bias_new is None else graph.add("Add", h_n, cell.bias_new))
    n = graph.add("Tanh", graph.add("Add", x_n, late))
    return graph.add("Add", n, graph.add("Mul", z, graph.add("Sub", h, n)))


def _body(graph: Graph, dtype: torch.dtype, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The body of a Scan; sizes are left to the run time. Without a rank of the outputs onnxruntime refuses it where
    it cannot infer one, as before opset 14."""
    from onnx import helper

    def values(names: Sequence[str], shape: Sequence[None] | None) -> list[Any]:
        return [helper.make_tensor_value_info(name, ELEMENTS[dtype], shape) for name in names]

    return helper.make_graph(graph.nodes, graph.fresh("step"), values(inputs, None), values(outputs, [None, None]))
