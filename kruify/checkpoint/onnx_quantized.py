"""LSTM nodes that onnxruntime's dynamic quantisation has written, as ONNX's own LSTM whose weights are computed.

DynamicQuantizeLSTM (com.microsoft) holds W and R as eight bits, (directions, inputs, gates * hidden), with a scale and
a zero point for each direction, or for each of its columns:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import Any

from kruify.checkpoint.onnx_graph import Proto

DOMAIN, OPERATOR = "com.microsoft", "DynamicQuantizeLSTM"
WEIGHTS = {1: (8, 9), 2: (10, 11)}
"""Places of W and R -> those of the scale and the zero point."""
INPUTS = 12


def with_own_lstms(graph: Proto) -> None:
    """Changes a graph in place, the bodies of its nodes, too.

    An LSTM computes in float32 what the node computed in eight bits.
    """
    nodes = list[Proto]()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                with_own_lstms(attribute.g)
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR) and _is_whole(node):
            node.domain, node.op_type = "", "LSTM"
            for place, (scale, zero) in WEIGHTS.items():
                name = f"{next(filter(None, node.output))}.{'WR'[place - 1]}"
                nodes += _weight(name, node.input[place], node.input[scale], node.input[zero])
                node.input[place] = name
            del node.input[WEIGHTS[1][0] :]
        nodes.append(node)
    if len(nodes) > len(graph.node):
        whole = type(graph)(node=nodes)  # copies, as the nodes of a graph are its own
        del graph.node[:]
        graph.node.MergeFrom(whole.node)


def _is_whole(node: Proto) -> bool:
    places = [place for item in WEIGHTS.items() for place in (item[0], *item[1])]
    return len(node.input) == INPUTS and all(node.input[place] for place in places) and any(node.output)


def _weight(name: str, values: str, scale: str, zero: str) -> list[Proto]:
    """Nodes that compute (values - zero) * scale with the last two dimensions changed over, as the LSTM has them."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    shape = numpy_helper.from_array(np.array([0, 1, -1]), f"{name}.shape")
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Constant", [], "shape", {"value": shape}),
        ("Cast", [values], "values", {"to": TensorProto.FLOAT}),
        ("Cast", [zero], "zero", {"to": TensorProto.FLOAT}),
        ("Reshape", [f"{name}.zero", shape.name], "zeros", {}),
        ("Reshape", [scale, shape.name], "scale", {}),
        ("Sub", [f"{name}.values", f"{name}.zeros"], "centred", {}),
        ("Mul", [f"{name}.centred", f"{name}.scale"], "product", {}),
    ]
    nodes = [helper.make_node(op, inputs, [f"{name}.{made}"], **more) for op, inputs, made, more in steps]
    return [*nodes, helper.make_node("Transpose", [f"{name}.product"], [name], perm=[0, 2, 1])]
