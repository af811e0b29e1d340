"""A whole ONNX model of the nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from kruify.graphs.nodes import Graph

OPSET = 17
IR_VERSION = 8  # onnxruntime 1.13 and later

ELEMENTS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}

Values = Sequence[tuple[str, Sequence[int | str]]]  # (name, shape), a string for a dynamic axis


def make_model(
    graph: Graph, dtype: str, inputs: Values, outputs: Values, about: dict[str, str], optional: Values = ()
) -> onnx.ModelProto:
    """The model, checked by onnx.

    Args:
        optional: inputs of whole numbers whose constants of the same names stand for them where they are left out.
    """
    element = ELEMENTS[dtype]
    proto = helper.make_graph(
        graph.nodes,
        "kruify",
        [
            *(helper.make_tensor_value_info(name, element, shape) for name, shape in inputs),
            *(helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in optional),
        ],
        [helper.make_tensor_value_info(name, element, shape) for name, shape in outputs],
        list(graph.constants.values()),
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="kruify")
    model.ir_version = IR_VERSION
    helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return model
