"""A small writer of ONNX graphs: nodes, constants, names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 17
IR_VERSION = 8  # onnxruntime 1.13 and later

ELEMENTS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


class Graph:
    """Nodes in order of execution. Names of values are strings; every method returns the name of what it computes.

    A body of a Scan is a graph too: it shares the constants of its parent and the supply of names.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = parent.constants if parent else {}
        self._names: dict[str, int] = parent._names if parent else {}

    def fresh(self, stem: str) -> str:
        """A name that no other value has."""
        number = self._names.get(stem, 0)
        self._names[stem] = number + 1
        return f"{stem}_{number}" if number else stem

    def constant(self, value: Tensor | NDArray[Any], stem: str) -> str:
        """A weight, stored once in the main graph."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        name = self.fresh(stem)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A shape or a list of axes; equal ones are stored once."""
        name = "ints_" + "_".join(map(str, values)).replace("-", "m")
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(values, dtype=np.int64), name)
        return name

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """A node with one output."""
        return self.add_many(op, *inputs, outputs=[out or self.fresh(op.lower())], **attributes)[0]

    def add_many(self, op: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), **attributes))
        return list(outputs)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """0 keeps a size, -1 is what is left over."""
        return self.add("Reshape", x, self.ints(shape))

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        names = [self.fresh("part") for _ in sizes]
        return self.add_many("Split", x, self.ints(sizes), outputs=names, axis=axis)

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=axis)

    def sum(self, parts: Sequence[str]) -> str:
        total = parts[0]
        for part in parts[1:]:
            total = self.add("Add", total, part)
        return total

    def rename(self, value: str, name: str) -> None:
        """Gives a value the name that the outside knows."""
        self.add("Identity", value, out=name)


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


def scan_body(graph: Graph, dtype: str, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The body of a Scan; shapes are left to the run time."""
    element = ELEMENTS[dtype]
    return helper.make_graph(
        graph.nodes,
        graph.fresh("step"),
        [helper.make_tensor_value_info(name, element, None) for name in inputs],
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
    )
