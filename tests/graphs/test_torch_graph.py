"""ONNX operators in torch, and the part of a graph behind its recurrent nodes, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kruify.errors import UnsupportedError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402
from small_graphs import BATCH, IN, STEPS, H, node, save, value, weights  # noqa: E402

from kruify.graphs.operators import OPERATORS  # noqa: E402
from kruify.graphs.record import RecordingGraph  # noqa: E402
from kruify.graphs.torch_graph import TorchGraph, run_chain  # noqa: E402
from kruify.training.together import recurrent  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = (RNG.normal(0, 1, (2, 3, 4)).astype("f4") for _ in "xy")
POSITIVE, IMAGE = np.abs(X) + 0.1, RNG.normal(0, 1, (2, 4, 5, 6)).astype("f4")
KERNEL, PER_CHANNEL = RNG.normal(0, 1, (6, 2, 3, 2)).astype("f4"), POSITIVE.ravel()[:4]
BIAS, PADDED, LIST = RNG.normal(0, 1, 6).astype("f4"), {"output_padding": [1, 0]}, np.array([1, 2])

CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    *((name, [X], {}) for name in ("Abs", "Erf", "Exp", "Neg", "Relu", "Sigmoid", "Tanh", "Softplus", "Identity")),
    *((name, [X], {}) for name in ("Elu", "LeakyRelu", "Shape", "Dropout", "Transpose", "Softmax")),
    *((name, [POSITIVE], {}) for name in ("Log", "Sqrt", "Reciprocal")),
    *((name, [X, Y], {}) for name in ("Add", "Sub", "Mul", "Div", "Equal", "Greater", "Less")),
    *((name, [X, Y, X - Y], {}) for name in ("Max", "Min", "Sum")),
    *(("Div", [np.array([-7, 7]), np.array([2, 2])], {}), ("Pow", [POSITIVE, Y], {}), ("Where", [X > 0, X, Y], {})),
    *(("LeakyRelu", [X], {"alpha": 0.3}), ("Elu", [X], {"alpha": 0.3}), ("PRelu", [X, PER_CHANNEL], {})),
    *(("MatMul", [X, Y.transpose(0, 2, 1)], {}), ("Einsum", [X, Y], {"equation": "abc,abd->acd"})),
    ("Gemm", [X[0], Y[0], POSITIVE[0, :, :3]], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [X[0].T.copy(), Y[0]], {"transA": 1, "transB": 1}),
    *(("Cast", [X], {"to": 7}), ("Clip", [X, np.float32(-0.5), np.float32(0.5)], {})),
    ("Clip", [X, None, np.float32(0)], {}),
    *(("Reshape", [X, np.array([0, -1])], {}), ("Flatten", [X], {"axis": 2}), ("Flatten", [X], {})),
    *(("Reshape", [X[:0], np.array([0, 4])], {"allowzero": 1}), ("Transpose", [X], {"perm": [1, 2, 0]})),
    *(("Squeeze", [X[:, :1], np.array([1])], {}), ("Squeeze", [X[:1]], {}), ("Unsqueeze", [X, np.array([0, -1])], {})),
    *(("Concat", [X, Y, X], {"axis": 1}), ("Expand", [X[:, :1], np.array([3, 1])], {})),
    *(("Split", [X], {"axis": 2}), ("Split", [X, np.array([1, 2])], {"axis": 1})),
    ("Slice", [X, LIST - 1, LIST, LIST], {}),
    ("Slice", [X, *(np.array([n]) for n in (-1, -99, 2, -2))], {}),
    ("Slice", [X, np.array([1]), np.array([2**62])], {}),
    *(("Gather", [X, np.array([[0, -1]])], {"axis": 1}), ("Gather", [np.array([5, 6]), np.array(1)], {})),
    *(("Pad", [X, np.array([0, 1, -1, 2, 0, 1])], {}), ("Pad", [X, np.array([0, 1, 1, 2, 0, 1]), np.float32(3)], {})),
    *(("Shape", [X], {"start": 1}), ("ConstantOfShape", [LIST], {})),
    *(("ReduceMean", [X], {}), ("ReduceMean", [X], {"axes": [1], "keepdims": 0})),
    ("ReduceSum", [X, np.array([-1])], {}),
    ("LogSoftmax", [X], {"axis": 1}),
    *(("Softmax", [X], {"axis": 1}), ("LayerNormalization", [X, PER_CHANNEL, PER_CHANNEL], {"axis": -1})),
    ("BatchNormalization", [IMAGE, *[PER_CHANNEL] * 4], {}),
    ("Conv", [IMAGE, KERNEL, BIAS], {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
    ("Conv", [X, RNG.normal(0, 1, (5, 3, 2)).astype("f4")], {}),
    ("ConvTranspose", [IMAGE, KERNEL[:4]], {"group": 2, "pads": [1, 0, 1, 0], "strides": [2, 1], **PADDED}),
]  # fmt: skip


EARLIER: list[tuple[int, str, list[Any], dict[str, Any]]] = [
    (9, "Slice", [X], {"starts": [1, -3], "ends": [2, 99], "axes": [0, 2]}),
    *((9, "Slice", [X], {"starts": [1], "ends": [-1]}), (9, "Pad", [X], {"pads": [0, 1, 1, 2, 0, 1], "value": 3.0})),
    *((9, "Clip", [X], {"min": -0.5, "max": 0.5}), (9, "Clip", [X], {"max": 0.0})),
    *((11, "Squeeze", [X[:, :1]], {"axes": [-2]}), (11, "Unsqueeze", [X], {"axes": [0, -1]})),
    *((11, "Split", [X], {"axis": 1, "split": [1, 2]}), (12, "ReduceSum", [X], {"axes": [-1], "keepdims": 0})),
    *((12, "Softmax", [X], {"axis": -1}), (12, "Softmax", [X[0]], {})),
]
"""What was an attribute in an opset before 13, or meant something else."""


def test_every_operator_is_met() -> None:
    assert {name for name, _, _ in CASES} == set(OPERATORS)


def test_a_softmax_of_several_axes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="several axes"):
        OPERATORS["Softmax"]({"opset": 12, "outputs": 1}, torch.from_numpy(X))


@pytest.mark.parametrize(("opset", "name", "inputs", "attributes"), [*((17, *case) for case in CASES), *EARLIER])
def test_operator(opset: int, name: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    arrays = {f"x{at}": np.asarray(array) for at, array in enumerate(inputs) if array is not None}
    kinds = {key: helper.np_dtype_to_tensor_dtype(array.dtype) for key, array in arrays.items()}
    given = [helper.make_tensor_value_info(key, kinds[key], array.shape) for key, array in arrays.items()]
    outputs = ["a", "b"] if name == "Split" else ["a"]
    names = ["" if array is None else f"x{at}" for at, array in enumerate(inputs)]
    one = helper.make_node(name, names, outputs, **attributes)
    graph = helper.make_graph([one], "g", given, [onnx.ValueInfoProto(name=output) for output in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    wanted = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, arrays
    )
    known = {"opset": opset, "outputs": len(outputs), **attributes}
    found = OPERATORS[name](
        known, *(None if array is None else torch.from_numpy(np.asarray(array)) for array in inputs)
    )
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_stands_behind_a_layer(kind: str, tmp_path: Path) -> None:
    """Two samples of different length, sequence_lens, two directions, a final state that is read."""
    constants = {**weights(kind, 2), "head": RNG.normal(0, 1, (H, 3)).astype("f4"), "two": np.float32(2)}
    nodes = [
        helper.make_node("Mul", ["X", "two"], ["doubled"]),
        helper.make_node(
            kind, ["doubled", "W", "R", "B", "lengths"], ["rnn", "last"], hidden_size=H, direction="bidirectional",
            **({"linear_before_reset": 1} if kind == "GRU" else {}),
        ),
        helper.make_node("MatMul", ["rnn", "head"], ["product"]),
        helper.make_node("Mul", ["two", "two"], ["four"]),
        helper.make_node("Mul", ["product", "four"], ["Y"]),
        helper.make_node("Tanh", ["last"], ["Z"]),
        helper.make_node("Neg", ["X"], ["beside"]),
    ]  # fmt: skip
    inputs = [value("lengths", ["batch"], onnx.TensorProto.INT32)]
    path = save(tmp_path / "a.onnx", nodes, constants, inputs, ("Y", "Z", "beside"), check=False)
    layer: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[kind](IN, H, bidirectional=True)
    from kruify.checkpoint import read

    tensors = read(path).tensors
    stem = next(name for name in tensors if name.endswith("weight_hh_l0")).removesuffix("weight_hh_l0")
    layer.load_state_dict({name: tensors[stem + name] for name in layer.state_dict()})
    graph = TorchGraph(path, {"rnn": recurrent(layer, bidirectional=True)})
    assert (graph.outputs, graph.constants, graph.given) == (["Y", "Z"], ["four"], ["doubled", "lengths"])
    recording = RecordingGraph(path, values=[*graph.constants, *graph.given])
    feeds = [
        {"X": RNG.normal(0, 1, (steps, BATCH, IN)).astype("f4"), "lengths": np.array([steps, shorter])}
        for steps, shorter in ((STEPS, STEPS - 1), (STEPS + 3, 0))
    ]
    runs = [recording.run(feed) for feed in feeds]
    values = [{name: torch.from_numpy(array) for name, array in run.values.items()} for run in runs]
    constant = {name: values[0][name] for name in graph.constants}
    given = [[{name: one[name] for name in graph.given}] for one in values]
    found = run_chain([graph], [constant], given)
    for (ours,), run in zip(found, runs, strict=True):
        for name in ("Y", "Z"):
            np.testing.assert_allclose(ours[name].detach().numpy(), run.outputs[name], atol=1e-5)
    found[1][0]["Y"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_an_operator_that_torch_has_not_is_named(tmp_path: Path) -> None:
    nodes = [node("LSTM", output="rnn"), helper.make_node("Einsum", ["rnn"], ["a"], equation="ijkl->ijkl")]
    nodes.append(helper.make_node("Acosh", ["a"], ["Y"]))
    path = save(tmp_path / "a.onnx", nodes, weights("LSTM"), check=False)
    with pytest.raises(UnsupportedError, match="operator Acosh"):
        TorchGraph(path, {"rnn": recurrent(nn.LSTM(IN, H), bidirectional=False)})
    assert TorchGraph(path, {}).outputs == []


def test_a_layer_of_16_bits_is_run_in_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["X"], ["short"], to=onnx.TensorProto.FLOAT16),
        node("LSTM", ("short", "W", "R", "B"), "rnn"),
        helper.make_node("Mul", ["rnn", "two"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["Y"], to=onnx.TensorProto.FLOAT),
    ]
    constants = {name: array.astype("f2") for name, array in {**weights("LSTM"), "two": np.array(2.0)}.items()}
    path = save(tmp_path / "a.onnx", nodes, constants, check=False)
    layer = nn.LSTM(IN, H)
    (found,) = TorchGraph(path, {"rnn": recurrent(layer, bidirectional=False)}).run(
        {}, [{"short": torch.zeros(STEPS, BATCH, IN, dtype=torch.float16)}]
    )
    assert found["Y"].dtype == torch.float32
    torch.testing.assert_close(found["Y"][:, 0], 2 * layer(torch.zeros(STEPS, BATCH, IN))[0])


def test_what_the_body_of_a_node_reads_is_read_by_the_node(tmp_path: Path) -> None:
    branches = [
        helper.make_graph([helper.make_node(name, ["rnn"], ["y"])], "b", [], [value("y")]) for name in ("Neg", "Abs")
    ]
    nodes = [
        node("LSTM", output="rnn"),
        helper.make_node("If", ["c"], ["Y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    path = save(tmp_path / "a.onnx", nodes, weights("LSTM") | {"c": np.array(True)}, check=False)
    with pytest.raises(UnsupportedError, match="operator If"):
        TorchGraph(path, {"rnn": recurrent(nn.LSTM(IN, H), bidirectional=False)})


def test_a_layer_that_does_not_change(tmp_path: Path) -> None:
    """It is run behind one that does, and is named where it is not given."""
    last = helper.make_node("LSTM", ["flat", "R2", "R"], ["Y"], hidden_size=H)
    nodes = [node("LSTM", output="rnn"), helper.make_node("Squeeze", ["rnn", "one"], ["flat"]), last]
    constants = weights("LSTM") | {"one": np.array([1]), "R2": weights("LSTM")["R"]}
    path = save(tmp_path / "a.onnx", nodes, constants, check=False)
    first = {"rnn": recurrent(nn.LSTM(IN, H), bidirectional=False)}
    with pytest.raises(UnsupportedError, match="operator LSTM"):
        TorchGraph(path, first)
    frozen = {"Y": recurrent(nn.LSTM(H, H), bidirectional=False)}
    behind = TorchGraph(path, first, frozen=frozen)
    assert behind.outputs == ["Y"] and TorchGraph(path, {}, frozen=frozen).outputs == []
    (found,) = behind.run({}, [{"X": torch.zeros(STEPS, BATCH, IN)}])
    assert found["Y"].shape == (STEPS, 1, BATCH, H)
