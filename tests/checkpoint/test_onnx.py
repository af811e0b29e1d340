"""Recurrent nodes of ONNX models wherever they stand; onnxruntime runs the file, torch.nn the layer that was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import origin, read, write_original
from kruify.conversion import inspect
from kruify.errors import KruifyError, UnsafeError, UnsupportedError, UsageError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper, to_proto = onnx.helper, onnx.numpy_helper.from_array
FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
STEPS, BATCH, IN, H = 4, 2, 3, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
NUMBERS = np.random.default_rng(0)


def weights(kind: str = "LSTM", directions: int = 1, scale: float = 0.5) -> dict[str, np.ndarray]:
    rows = GATES[kind] * H
    shapes = {"W": (directions, rows, IN), "R": (directions, rows, H), "B": (directions, 2 * rows)}
    return {name: NUMBERS.normal(0, scale, shape).astype("f4") for name, shape in shapes.items()}


def node(kind: str = "LSTM", inputs: Sequence[str] = ("X", "W", "R", "B"), output: str = "Y", **attributes: Any) -> Any:
    if kind == "GRU":
        attributes = {"linear_before_reset": 1, **attributes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return helper.make_node(kind, list(inputs), [output], hidden_size=H, **attributes)


def model(nodes: Sequence[Any], constants: dict[str, np.ndarray], outputs: Sequence[str] = ("Y",), **more: Any) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("X", FLOAT, [STEPS, BATCH, IN])],
        [
            helper.make_tensor_value_info(name, FLOAT, list("abcd") if name[0] == "Y" else list("abc"))
            for name in outputs
        ],
        [to_proto(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), *more.pop("opsets", ())], **more)


def saved(folder: Path, proto: Any) -> Path:
    proto.ir_version = 8
    onnx.checker.check_model(proto)
    onnx.save(proto, folder / "a.onnx")
    return folder / "a.onnx"


def run(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"X": x.numpy()})]


def layer_outputs(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """What torch.nn's layers with the weights that were read compute: (time, directions, batch, hidden)."""
    found = []
    for layer in kruify.load(path).values():
        with torch.no_grad():
            y = layer(x)[0]
        found.append(y.reshape(STEPS, BATCH, -1, H).transpose(1, 2))
    return found


def check(folder: Path, proto: Any, layers: int = 1) -> Path:
    """The file computes what the layers that were read compute, as it is and after other weights were written into it.

    The model's outputs are those of its recurrent nodes, in the order in which these are found.
    """
    path, x = saved(folder, proto), torch.randn(STEPS, BATCH, IN)
    checkpoint = read(path)
    assert len(checkpoint.module_hints) == layers and not checkpoint.skipped
    torch.testing.assert_close(layer_outputs(path, x), run(path, x))
    target = folder / "b.onnx"
    new = {name: torch.randn_like(t) if name not in checkpoint.ties else None for name, t in checkpoint.tensors.items()}
    new = {name: new[checkpoint.ties.get(name, name)] for name in new}
    write_original(target, new, origin(checkpoint), source=path)
    onnx.checker.check_model(onnx.load(target))
    assert not torch.allclose(run(target, x)[0], run(path, x)[0])
    torch.testing.assert_close(layer_outputs(target, x), run(target, x))
    assert read(target).ties == checkpoint.ties
    return target


TORCHS = ["Sigmoid", "Tanh", "Tanh"]


@pytest.mark.parametrize(
    ("kind", "attributes", "words"),
    [
        ("RNN", {"direction": "bidirectional", "activations": ["Tanh", "Relu"]}, "two directions have different"),
        ("RNN", {"direction": "bidirectional", "activations": ["Tanh", "Affine"], "activation_alpha": [1.0]}, "affine"),
        ("RNN", {"direction": "bidirectional", "activations": ["Relu"]}, "activations"),
        ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.3]}, "leakyrelu"),
        ("LSTM", {"direction": "bidirectional", "activations": [*TORCHS, "Sigmoid", "Tanh", "Relu"]}, "relu"),
        ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_alpha": [0.2]}, "hardsigmoid"),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}, "relu"),
        ("GRU", {"linear_before_reset": 0}, "resets before"),
        ("GRU", {"linear_before_reset": None}, "resets before"),
        ("LSTM", {"input_forget": 1}, "couples"),
        ("LSTM", {"clip": 0.5}, "clips"),
        ("RNN", {"clip": 0.5}, "clips"),
        ("GRU", {"direction": "reverse"}, "backwards"),
        ("GRU", {"direction": "sideways"}, "sideways"),
        ("GRU", {"layout": 2}, "layout"),
        ("GRU", {"hidden_size": H + 1}, "hidden_size"),
        ("LSTM", {"zoneout": 0.1}, "zoneout"),
    ],
)  # fmt: skip
def test_settings_that_torch_lacks_are_named(tmp_path: Path, kind: str, attributes: dict, words: str) -> None:
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    made = node(kind, name="rnn/", **{k: v for k, v in attributes.items() if k != "hidden_size"})
    for attribute in made.attribute:
        if attribute.name == "hidden_size":
            attribute.i = attributes.get("hidden_size", H)
    onnx.save(model([made], weights(kind, directions)), tmp_path / "a.onnx")
    checkpoint = read(tmp_path / "a.onnx")
    assert words in checkpoint.skipped["rnn"] and not checkpoint.module_hints
    assert {item.name for item in inspect(checkpoint).skipped} == {"rnn"}


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("RNN", {"direction": "bidirectional", "activations": ["Relu", "Relu"]}),
        ("RNN", {"activations": ["Tanh"], "activation_alpha": [0.3], "activation_beta": [2.0]}),  # Tanh takes neither
        ("LSTM", {"direction": "bidirectional", "activations": TORCHS * 2}),
        ("GRU", {"direction": "bidirectional"}),
    ],
)
def test_settings_that_torch_has(tmp_path: Path, kind: str, attributes: dict) -> None:
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    check(tmp_path, model([node(kind, **attributes)], weights(kind, directions)))


def test_peepholes_are_named(tmp_path: Path) -> None:
    constants = {**weights(), "P": np.ones((1, 3 * H), "f4")}
    path = saved(tmp_path, model([node(inputs=["X", "W", "R", "B", "", "", "", "P"])], constants))
    assert "peepholes" in read(path).skipped["lstm_0"]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _int8(w: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.abs(w).max((0, 2)) / 127
    return {"q": np.round(w / scale[:, None]).astype("i1"), "s": scale.astype("f4"), "z": np.zeros(len(scale), "i1")}


CHAINS: dict[str, Callable[[np.ndarray], tuple[list[Any], dict[str, np.ndarray]]]] = {
    "Identity": lambda w: (
        [helper.make_node("Identity", ["w"], ["i"]), helper.make_node("Identity", ["i"], ["W"])],
        {"w": w},
    ),
    "Constant": lambda w: ([helper.make_node("Constant", [], ["W"], value=to_proto(w))], {}),
    "Unsqueeze": lambda w: ([helper.make_node("Unsqueeze", ["w", "axes"], ["W"])], {"w": w[0], "axes": ints(0)}),
    "Squeeze": lambda w: ([helper.make_node("Squeeze", ["w", "axes"], ["W"])], {"w": w[:, None], "axes": ints(1)}),
    "Slice": lambda w: (
        [helper.make_node("Slice", ["w", "from", "to", "axes"], ["W"])],
        {"w": np.concatenate([w, w], 1), "from": ints(0), "to": ints(w.shape[1]), "axes": ints(1)},
    ),
    "Concat": lambda w: (
        [helper.make_node("Concat", ["a", "b"], ["W"], axis=1)],
        {"a": w[:, :5], "b": w[:, 5:]},
    ),
    "Transpose": lambda w: ([helper.make_node("Transpose", ["w"], ["W"], perm=[0, 2, 1])], {"w": w.transpose(0, 2, 1)}),
    "Reshape": lambda w: (
        [helper.make_node("Constant", [], ["s"], value_ints=w.shape), helper.make_node("Reshape", ["w", "s"], ["W"])],
        {"w": w.reshape(-1)},
    ),
    "Cast": lambda w: ([helper.make_node("Cast", ["w"], ["W"], to=FLOAT)], {"w": w.astype("f8")}),
    "DequantizeLinear": lambda w: ([helper.make_node("DequantizeLinear", ["q", "s", "z"], ["W"], axis=1)], _int8(w)),
    "Mul": lambda w: (
        [helper.make_node("Cast", ["q"], ["f"], to=FLOAT), helper.make_node("Mul", ["f", "s"], ["W"])],
        {"q": _int8(w)["q"], "s": _int8(w)["s"][:, None]},
    ),
    "MatMul": lambda w: (
        [helper.make_node("MatMul", ["u", "v"], ["m"]), helper.make_node("Unsqueeze", ["m", "axes"], ["W"])],
        {"u": w[0], "v": np.eye(w.shape[2], dtype="f4"), "axes": ints(0)},
    ),
    "Shape": lambda w: (
        [helper.make_node("Shape", ["like"], ["s"]), helper.make_node("Reshape", ["w", "s"], ["W"])],
        {"w": w[0], "like": np.zeros(w.shape, "f4")},
    ),
    "Split": lambda w: (
        [helper.make_node("Split", ["w", "sizes"], ["W", "rest"], axis=0)],
        {"w": np.concatenate([w, w]), "sizes": ints(1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_weights_computed_from_constants_are_folded(tmp_path: Path, chain: str) -> None:
    nodes, constants = CHAINS[chain](weights()["W"])
    others = {name: array for name, array in weights().items() if name != "W"}
    target = check(tmp_path, model([*nodes, node()], {**constants, **others}))
    assert inspect(tmp_path / "a.onnx").parameters == 4 * H * (IN + H + 2)
    if chain not in ("Constant", "Identity"):
        kept = {proto.name for proto in onnx.load(target).graph.initializer}
        assert not kept & {"w", "q", "a", "b", "u"}, "what nothing reads any more stays behind"


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([helper.make_node("RandomNormalLike", ["w"], ["W"])], "RandomNormalLike"),
        ([helper.make_node("ReduceMean", ["X"], ["m"]), helper.make_node("Mul", ["w", "m"], ["W"])], "ReduceMean"),
        ([helper.make_node("Mul", ["w", "X"], ["W"])], "input X"),
        ([helper.make_node("Reshape", ["w", "missing"], ["W"])], "missing"),
        ([helper.make_node("Transpose", ["w"], ["W"], perm=[0, 0, 7])], "cannot follow"),
        ([helper.make_node("Cast", ["w"], ["W"], to=FLOAT), helper.make_node("Cast", ["W"], ["w2"], to=FLOAT)], ""),
        ([helper.make_node("Neg", ["b"], ["W"]), helper.make_node("Neg", ["W"], ["b"])], "from itself"),
        ([helper.make_node("Identity", ["b"], ["W"]), helper.make_node("Identity", ["W"], ["b"])], "input"),
    ],
)
def test_weights_that_are_not_constant_are_named(tmp_path: Path, nodes: list, words: str) -> None:
    constants = weights()
    constants["w"] = constants.pop("W")
    onnx.save(model([*nodes, node()], constants), tmp_path / "a.onnx")
    checkpoint = read(tmp_path / "a.onnx")
    assert len(checkpoint.skipped) + len(checkpoint.module_hints) == 1
    assert not words or words in next(iter(checkpoint.skipped.values()))


@pytest.mark.parametrize("chain", ["Mul", "Expand", "MatMul", "ConstantOfShape"])
def test_a_small_file_does_not_fold_to_a_large_weight(tmp_path: Path, chain: str) -> None:
    n = 60_000
    column, row = np.ones((1, n, 1), "f4"), np.ones((1, 1, n), "f4")
    made = {
        "Mul": helper.make_node("Mul", ["a", "b"], ["W"]),
        "MatMul": helper.make_node("MatMul", ["a", "b"], ["W"]),
        "Expand": helper.make_node("Expand", ["a", "shape"], ["W"]),
        "ConstantOfShape": helper.make_node("ConstantOfShape", ["shape"], ["W"]),
    }[chain]
    constants = {"a": column, "b": row, "shape": ints(1, n, n), "R": weights()["R"]}
    onnx.save(model([made, node(inputs=["X", "W", "R"])], constants), tmp_path / "a.onnx")
    assert "far beyond" in read(tmp_path / "a.onnx").skipped["lstm_1"]


def value(name: str, shape: Any = None, kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def in_if(constants: dict[str, np.ndarray]) -> Any:
    """One LSTM in each branch; that of the else branch is a second output by way of another If."""
    branches = {}
    for branch in ("then", "else"):
        names = [f"{part}_{branch}" for part in "WRB"]
        local = [to_proto(array, name) for array, name in zip(weights().values(), names, strict=True)]
        y = f"Y_{branch}"
        graph = helper.make_graph([node(inputs=["X", *names], output=y)], branch, [], [value(y)], local)
        branches[f"{branch}_branch"] = graph
    nodes = [
        helper.make_node("If", [flag], [out], name=name, **branches)
        for flag, out, name in (("yes", "Y", "first"), ("no", "Y2", "second"))
    ]
    return model(nodes, {"yes": np.array(True), "no": np.array(False)}, ["Y", "Y2"])


def test_nodes_in_the_branches_of_an_if(tmp_path: Path) -> None:
    path = saved(tmp_path, in_if({}))
    x = torch.randn(STEPS, BATCH, IN)
    checkpoint = read(path)
    names = [f"{outer}.{branch}_branch.lstm_0" for outer in ("first", "second") for branch in ("then", "else")]
    assert sorted(checkpoint.module_hints) == sorted(names) and not checkpoint.skipped
    found = dict(zip(kruify.load(path), layer_outputs(path, x), strict=True))
    torch.testing.assert_close([found[names[0]], found[names[3]]], run(path, x))
    new = {name: torch.randn_like(tensor) for name, tensor in checkpoint.tensors.items()}
    write_original(tmp_path / "b.onnx", new, origin(checkpoint), source=path)
    found = dict(zip(kruify.load(tmp_path / "b.onnx"), layer_outputs(tmp_path / "b.onnx", x), strict=True))
    torch.testing.assert_close([found[names[0]], found[names[3]]], run(tmp_path / "b.onnx", x))


@pytest.mark.parametrize("folded", [False, True])
def test_a_node_in_a_loop_with_weights_from_outside(tmp_path: Path, folded: bool) -> None:
    constants = {**weights(), "turns": ints(1)[0], "yes": np.array(True)}
    inner = node(inputs=["X", "W", "R", "B"], output="y")
    before = []
    if folded:
        constants["w"] = constants.pop("W")[0]
        constants["axes"] = ints(0)
        before = [helper.make_node("Unsqueeze", ["w", "axes"], ["W"])]
    keep = helper.make_node("Identity", ["c"], ["d"])
    body = helper.make_graph(
        [*before, inner, keep], "b", [value("i", [], INT64), value("c", [], BOOL), value("s", None)],
        [value("d", [], BOOL), value("y", None)],
    )  # fmt: skip
    zeros = helper.make_node("ConstantOfShape", ["shape"], ["s0"])
    constants["shape"] = ints(STEPS, 1, BATCH, H)
    check(tmp_path, model([zeros, helper.make_node("Loop", ["turns", "yes", "s0"], ["Y"], body=body)], constants))
    assert next(iter(read(tmp_path / "a.onnx").module_hints)).startswith("loop_1.body.lstm_")


def function(*nodes: Any, inputs: Sequence[str] = ("X", "W", "R", "B"), **more: Any) -> Any:
    return helper.make_function("own", "Layer", list(inputs), ["Y"], list(nodes), [helper.make_opsetid("", 17)], **more)


OWN = helper.make_opsetid("own", 1)


def call(output: str = "Y", inputs: Sequence[str] = ("X", "W", "R", "B"), **attributes: Any) -> Any:
    return helper.make_node("Layer", list(inputs), [output], domain="own", name=f"call{output}", **attributes)


def test_nodes_in_functions_that_are_called_with_several_weights(tmp_path: Path) -> None:
    first, second = weights(), {f"{name}2": array for name, array in weights().items()}
    nodes = [call(), call("Y2", ("X", *second))]
    proto = model(nodes, {**first, **second}, ["Y", "Y2"], functions=[function(node())], opsets=[OWN])
    check(tmp_path, proto, layers=2)
    assert list(read(tmp_path / "a.onnx").module_hints) == ["callY.lstm_0", "callY2.lstm_0"]


def test_weights_folded_in_a_function_that_is_called_once(tmp_path: Path) -> None:
    constants = weights()
    constants["W"] = constants["W"][0]
    inside = [
        helper.make_node("Constant", [], ["axes"], value=to_proto(ints(0))),
        helper.make_node("Unsqueeze", ["W", "axes"], ["W3"]),
        node(inputs=["X", "W3", "R", "B"]),
    ]
    check(tmp_path, model([call()], constants, functions=[function(*inside)], opsets=[OWN]))


def test_folded_weights_of_a_function_called_twice_are_read_and_not_written(tmp_path: Path) -> None:
    constants = {**weights(), "V": weights()["W"][0]}
    constants["W"] = constants["W"][0]
    inside = [
        helper.make_node("Constant", [], ["axes"], value=to_proto(ints(0))),
        helper.make_node("Unsqueeze", ["W", "axes"], ["W3"]),
        node(inputs=["X", "W3", "R", "B"]),
    ]
    nodes = [call(), call("Y2", ("X", "V", "R", "B"))]
    path = saved(tmp_path, model(nodes, constants, ["Y", "Y2"], functions=[function(*inside)], opsets=[OWN]))
    x = torch.randn(STEPS, BATCH, IN)
    torch.testing.assert_close(layer_outputs(path, x), run(path, x))
    checkpoint = read(path)
    with pytest.raises(UnsupportedError, match="called several times"):
        write_original(tmp_path / "b.onnx", checkpoint.tensors, origin(checkpoint), source=path)
    assert not (tmp_path / "b.onnx").exists()


def test_attributes_that_a_function_takes_from_its_call(tmp_path: Path) -> None:
    inside = node("RNN")
    inside.attribute.append(onnx.AttributeProto(name="activations", ref_attr_name="kind", type=8))
    made = function(inside, attributes=["kind"])
    constants = weights("RNN")
    nodes = [call(kind=["Relu"]), call("Y2", kind=["Tanh"]), call("Y3", kind=["Softsign"])]
    path = saved(tmp_path, model(nodes, constants, ["Y", "Y2", "Y3"], functions=[made], opsets=[OWN]))
    checkpoint = read(path)
    assert [hint.options["nonlinearity"] for hint in checkpoint.module_hints.values()] == ["relu", "tanh"]
    assert "softsign" in checkpoint.skipped["callY3.rnn_0"]


def test_recurrent_layers_without_a_recurrent_node_are_named(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "V"], ["n"]), helper.make_node("Identity", ["n"], ["y"])],
        "b", [value("h"), value("x")], [value("n"), value("y")],
    )  # fmt: skip
    nodes = [
        helper.make_node("DynamicQuantizeLSTM", ["X"], ["q"], domain="com.microsoft", name="/dq"),
        helper.make_node("AttnLSTM", ["X"], ["a"], domain="com.microsoft"),
        helper.make_node("Scan", ["h0", "X"], ["last", "s"], body=body, num_scan_inputs=1),
        helper.make_node("MyGRU", ["X"], ["m"], domain="own"),
    ]
    unrolled = helper.make_function(
        "own", "MyGRU", ["X"], ["Y"], [helper.make_node("Tanh", ["X"], ["Y"])], [helper.make_opsetid("", 17)]
    )
    onnx.save(model(nodes, {"V": np.ones((3, 3), "f4")}, functions=[unrolled], opsets=[OWN]), tmp_path / "a.onnx")
    skipped = read(tmp_path / "a.onnx").skipped
    assert set(skipped) == {"dq", "attnlstm_1", "scan_2", "mygru_3"}
    assert "com.microsoft.DynamicQuantizeLSTM" in skipped["dq"] and "quantised" in skipped["dq"]
    assert "multiplies matrices" in skipped["scan_2"] and "function" in skipped["mygru_3"]


@pytest.mark.parametrize("by", ["name", "Identity", "Unsqueeze"])
def test_nodes_that_share_weights_are_tied(tmp_path: Path, by: str) -> None:
    constants = weights()
    second, between = ["X", "W", "R", "B"], []
    if by == "Identity":
        second[1], between = "V", [helper.make_node("Identity", ["W"], ["V"])]
    if by == "Unsqueeze":
        constants |= {"w": constants.pop("W")[0], "axes": ints(0)}
        second[1] = "V"
        between = [helper.make_node("Unsqueeze", ["w", "axes"], [name]) for name in ("W", "V")]
    proto = model([*between, node(name="one"), node(inputs=second, output="Y2", name="two")], constants, ["Y", "Y2"])
    check(tmp_path, proto, layers=2)
    path = tmp_path / "a.onnx"
    assert read(path).ties == {f"two.{n}": f"one.{n}" for n in (*nn.LSTM(1, 1).state_dict(),)}
    assert inspect(path).parameters == 4 * H * (IN + H + 2)
    both = kruify.convert(path, "2x2", dry_run=True).parameters
    one = kruify.convert(path, "2x2", only=["one*"], dry_run=True).parameters
    assert both.recurrent_after < one.recurrent_after and one.total_after > one.recurrent_after


def test_nodes_that_shared_weights_come_apart(tmp_path: Path) -> None:
    proto = model([node(name="one"), node(output="Y2", name="two")], weights(), ["Y", "Y2"])
    path, x = saved(tmp_path, proto), torch.randn(STEPS, BATCH, IN)
    kruify.convert(path, "2x2", only=["one*"], output=tmp_path / "a.kru.safetensors")
    kruify.export(tmp_path / "a.kru.safetensors", "dense", tmp_path / "b.onnx", original=path)
    first, second = run(tmp_path / "b.onnx", x)
    torch.testing.assert_close(layer_outputs(tmp_path / "b.onnx", x), [first, second])
    torch.testing.assert_close(second, run(path, x)[1])
    assert not torch.allclose(first, second)


def test_a_weight_that_other_nodes_read_too_keeps_its_numbers_there(tmp_path: Path) -> None:
    copy = helper.make_node("Abs", ["W"], ["Z"])
    path = saved(tmp_path, model([node(), copy], weights(), ["Y", "Z"]))
    x, checkpoint = torch.randn(STEPS, BATCH, IN), read(path)
    assert "read by other nodes" in " ".join(checkpoint.notes)
    new = {name: torch.randn_like(t) if "lstm" in name else t for name, t in checkpoint.tensors.items()}
    write_original(tmp_path / "b.onnx", new, origin(checkpoint), source=path)
    y, z = run(tmp_path / "b.onnx", x)
    torch.testing.assert_close(layer_outputs(tmp_path / "b.onnx", x), [y])
    assert torch.equal(z, run(path, x)[1])


def test_constants_are_parameters_and_whole_numbers_are_not(tmp_path: Path) -> None:
    inside = {
        "Constant": to_proto(np.ones((5, 7), "f4")),
        "axes": to_proto(ints(0, 1)),
        "text": to_proto(np.array(["a"])),
    }
    nodes = [helper.make_node("Constant", [], [name], value=proto) for name, proto in inside.items()]
    path = saved(tmp_path, model([*nodes, node()], {**weights(), "labels": np.array(["a", "b"]), "table": ints(1, 2)}))
    inspected = inspect(path)
    assert inspected.parameters == 35 + 4 * H * (IN + H + 2)
    assert {name for name in read(path).tensors if "lstm" not in name} == {"Constant"}


def test_eight_bit_weights_are_said_to_be_read_as_floats(tmp_path: Path) -> None:
    nodes, constants = CHAINS["DequantizeLinear"](weights()["W"])
    others = {name: array for name, array in weights().items() if name != "W"}
    path = saved(tmp_path, model([*nodes, node()], {**constants, **others}))
    assert "8-bit weights of lstm_1 are read as float32" in " ".join(read(path).notes)


def test_numbers_outside_the_file_are_refused_wherever_they_are(tmp_path: Path) -> None:
    outside = onnx.TensorProto(name="v", data_type=FLOAT, dims=[1], data_location=1)
    outside.external_data.add(key="location", value="/etc/passwd")
    branch = helper.make_graph([], "b", [], [value("v")], [outside])
    made = [
        helper.make_node("If", ["flag"], ["Y"], then_branch=branch, else_branch=branch),
        helper.make_node("Constant", [], ["Y"], value=outside),
    ]
    for one in made:
        onnx.save(model([one, node(output="Z")], {**weights(), "flag": np.array(True)}), tmp_path / "a.onnx")
        with pytest.raises(UnsafeError, match="outside"):
            read(tmp_path / "a.onnx")
    fill = [
        helper.make_node("ConstantOfShape", ["s"], ["w"], value=outside),
        helper.make_node("Mul", ["w", "V"], ["W"]),
    ]
    constants = {**weights(), "s": ints(1)}
    constants["V"] = constants.pop("W")
    onnx.save(model([*fill, node()], constants), tmp_path / "a.onnx")
    with pytest.raises(UnsafeError, match="outside"):
        read(tmp_path / "a.onnx")


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    made = function(call("Y"))
    proto = model([call()], weights(), functions=[made], opsets=[OWN])
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeError, match="nested"):
        read(tmp_path / "a.onnx")


def test_functions_that_call_each_other_twice_are_refused(tmp_path: Path) -> None:
    """2^18 calls in a file of 2 kB."""
    functions = [
        helper.make_function(
            "own", f"f{i}", ["X"], ["Y"],
            [helper.make_node(f"f{i + 1}", ["X"], [out], domain="own") for out in ("Z", "Y")], [OWN],
        )
        for i in range(18)
    ]  # fmt: skip
    last = helper.make_function("own", "f18", ["X"], ["Y"], [helper.make_node("Tanh", ["X"], ["Y"])], [OWN])
    proto = model([helper.make_node("f0", ["X"], ["Y"], domain="own")], {}, functions=[*functions, last])
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeError, match="too many nodes"):
        read(tmp_path / "a.onnx")


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(IN, H, batch_first=True), nn.Linear(H, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[1][0][0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", [False, True])
def test_a_graph_loads_into_the_module_that_it_was_made_of(tmp_path: Path, convert: bool) -> None:
    dense, x = Last().eval(), torch.randn(2, STEPS, IN)
    path = tmp_path / "a.onnx"
    torch.onnx.export(dense, (x,), path, dynamo=False)
    assert set(read(path).tensors) > {"rnn.LSTM.weight_hh_l0", "head.weight"}
    if convert:
        kruify.convert(path, "4*(4x1,1x4)", output=tmp_path / "a.kru.safetensors")
        path = tmp_path / "a.kru.safetensors"
    names = {"rnn.LSTM": "rnn"}
    torch.testing.assert_close(kruify.load(path, into=Last(), rename=names)(x), dense(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(KruifyError, match=r"missing|no layer"):
        kruify.load(path, into=Last())
    with pytest.raises(UsageError, match=r"nothing named 'rnn\.GRU'"):
        kruify.load(path, into=Last(), rename={"rnn.GRU": "rnn"})
    with pytest.raises(UsageError, match="two tensors"):
        kruify.load(path, into=Last(), rename={"head.weight": "head.bias"})
