"""Small ONNX models, and what onnxruntime computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

STEPS, BATCH, IN, H = 5, 2, 6, 8
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def weights(kind: str, directions: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rows = GATES[kind] * H
    numbers = np.random.default_rng(seed)
    shapes = {"W": (directions, rows, IN), "R": (directions, rows, H), "B": (directions, 2 * rows)}
    return {name: numbers.normal(0, 0.5, shape).astype("f4") for name, shape in shapes.items()}


def value(name: str, shape: Sequence[Any] | None = None, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, inputs: Sequence[str] = ("X", "W", "R", "B"), output: str = "Y", **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), [output], hidden_size=H, **attributes)


def lstm_step(t: int, c: str, candidate: str = "Tanh") -> list[Any]:
    """Step t of an LSTM behind its products, as torch writes it: h<t + 1> and c<t> of the gates g<t> and a state c."""
    make = helper.make_node
    return [
        make("Split", [f"g{t}"], [f"i{t}", f"f{t}", f"n{t}", f"o{t}"], axis=1),
        *(make("Sigmoid", [f"{gate}{t}"], [f"s{gate}{t}"]) for gate in "ifo"),
        make(candidate, [f"n{t}"], [f"tg{t}"]),
        make("Mul", [f"sf{t}", c], [f"fc{t}"]),
        make("Mul", [f"si{t}", f"tg{t}"], [f"ig{t}"]),
        make("Add", [f"fc{t}", f"ig{t}"], [f"c{t}"]),
        make("Tanh", [f"c{t}"], [f"tc{t}"]),
        make("Mul", [f"so{t}", f"tc{t}"], [f"h{t + 1}"]),
    ]


def save(
    path: Path,
    nodes: Sequence[Any],
    constants: Mapping[str, np.ndarray],
    inputs: Sequence[Any] = (),
    outputs: Sequence[str] = ("Y",),
    opset: int = 17,
    ir_version: int = 8,
    check: bool = True,
    **more: Any,
) -> Path:
    """A model of one input X (time, batch, features), and of others."""
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    given = [value("X", ["time", "batch", IN]), *inputs]
    if ir_version < 4:
        given += [value(p.name, p.dims, p.data_type) for p in initializers]
    results = [value(name, ["time", "directions", "batch", H] if check else None) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", given, results, initializers, doc_string="of the user")
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="the user", **more)
    helper.set_model_props(model, {"note": "kept"})
    model = model if check else onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(model, full_check=check)
    onnx.save(model, path)
    return path


def run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(0, 1, (STEPS, BATCH, IN)).astype("f4")
    return list(session.run(None, {"X": x, **feeds}))


def folded(path: Path) -> list[str]:
    """Operators that are left once onnxruntime has loaded a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".loaded"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [one.op_type for one in onnx.load(path.with_suffix(".loaded")).graph.node]
