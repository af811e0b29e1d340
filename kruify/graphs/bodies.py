"""Hands what a node in the body of an If or Loop reads out to the main graph, as sequences of tensors.

A sequence goes in at the outermost node and comes out longer by one tensor for each time that the body is run: none
where the branch of an If is not taken, one for each turn of a Loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from kruify.checkpoint.onnx_graph import Node, Proto

BODIES = ("If", "Loop")
OPSET = 14
"""From which on Identity takes sequences."""
LENGTHS = 4
"""The input of a recurrent node that holds whole numbers."""


def handed_out(model: Proto, node: Node, names: Iterable[str]) -> dict[str, str]:
    """Changes a model in place.

    Args:
        node: a recurrent node in a body.
        names: some of its inputs.

    Returns:
        name -> a value of the main graph, a sequence of float32, of int64 for lengths.
    """
    from onnx import TensorProto

    kinds = {name: TensorProto.INT64 if name in node.proto.input[LENGTHS:][:1] else TensorProto.FLOAT for name in names}
    return {name: _handed_out(model, node, name, kind) for name, kind in kinds.items()}


def _handed_out(model: Proto, node: Node, name: str, kind: int) -> str:
    from onnx.helper import make_node, make_tensor_sequence_value_info

    stem = f"kruify.recorded.{len(model.graph.node)}"
    given = f"{stem}.none"
    model.graph.node.insert(0, make_node("SequenceEmpty", [], [given], dtype=kind))
    chain = [node, *node.around()][::-1]
    for level, (around, inner) in enumerate(pairwise(chain)):
        result, inside = f"{stem}.{level}", make_tensor_sequence_value_info(f"{stem}.{level + 1}", kind, None)
        if around.proto.op_type == "If":
            around.proto.output.append(result)
            other = make_tensor_sequence_value_info(f"{result}.other", kind, None)
            for branch in around.proto.attribute:
                taken = branch.name == inner.scope.attribute
                branch.g.output.append(inside if taken else other)
                if not taken:
                    branch.g.node.append(make_node("Identity", [given], [other.name]))
        else:
            around.proto.input.extend([""] * (2 - len(around.proto.input)))  # how often, and whether at all
            carried = len(around.proto.input) - 2
            around.proto.input.append(given)
            given = f"{result}.before"
            inner.scope.body.input.append(make_tensor_sequence_value_info(given, kind, None))
            inner.scope.body.output.insert(1 + carried, inside)
            around.proto.output.insert(carried, result)
    cast = make_node("Cast", [name], [f"{stem}.value"], to=kind)
    node.scope.body.node.extend([cast, make_node("SequenceInsert", [given, cast.output[0]], [inside.name])])
    return f"{stem}.0"
