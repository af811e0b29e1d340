"""npz, sharded, ONNX and Keras files, made by the real libraries; their layers against torch's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from kruify.checkpoint import read
from kruify.checkpoint.gates import ORDER, from_torch, to_torch
from kruify.errors import CorruptError, UnsafeError, UnsupportedError, UsageError


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save) -> None:
    state = {f"module.{name}": tensor for name, tensor in nn.GRU(3, 4).state_dict().items()}
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    save(tmp_path / "a.npz", **arrays, **{"module.fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))})
    checkpoint = read(tmp_path / "a.npz")
    expected = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert checkpoint.format == "npz" and checkpoint.prefix == "module."
    assert_same(checkpoint.tensors, {**expected, "fortran": torch.arange(6.0, dtype=torch.float64).reshape(2, 3)})


def test_npz_big_endian_and_half(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([1.5, 2], ">f4"), b=np.array([1, 2], np.float16), c=np.array(True))
    found = read(tmp_path / "a.npz").tensors
    assert found["a"].tolist() == [1.5, 2] and found["b"].dtype == torch.float16 and found["c"].item() is True


def test_npz_of_single_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", count=np.array(7), w=np.ones((2, 2), "f4"))
    found = read(tmp_path / "a.npz").tensors
    assert found["count"].shape == () and found["count"].item() == 7


@pytest.mark.parametrize("shape", [(0, 1 << 63), (0, 1 << 40, 1 << 40), (1,) * 70])
def test_shapes_that_torch_cannot_hold_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    size = 0 if 0 in shape else 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises((UnsupportedError, CorruptError)):
        read(tmp_path / "a.safetensors")


def test_npz_refusals(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(UnsafeError, match="is a pickle"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", a=np.array(["text"]))
    with pytest.raises(UnsupportedError, match="dtype"):
        read(tmp_path / "a.npz")


def test_onnx_nodes_of_one_name(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weights = [
        onnx.numpy_helper.from_array(np.ones(shape, "f4"), name) for name, shape in (("W", (1, 4, 1)), ("R", (1, 4, 1)))
    ]
    nodes = [helper.make_node("LSTM", ["X", "W", "R"], [f"Y{i}"], name="same", hidden_size=1) for i in range(3000)]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    onnx.save_model(helper.make_model(graph), tmp_path / "a.onnx")
    checkpoint = read(tmp_path / "a.onnx")
    assert len(checkpoint.module_hints) == 3000 and max(map(len, checkpoint.module_hints)) <= len("same_3000")


def shards(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {f"model.{name}": tensor for name, tensor in nn.LSTM(3, 4, 2).state_dict().items()}
    names, suffix = list(state), "safetensors" if kind == "safetensors" else "bin"
    table = {}
    for part, chosen in enumerate((names[:3], names[3:])):
        file = f"model-{part:05}-of-00002.{suffix}"
        content = {name: state[name] for name in chosen}
        (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(content, folder / file)
        table |= dict.fromkeys(chosen, file)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}, indent=2))
    return index, {name.removeprefix("model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_sharded(tmp_path: Path, kind: str) -> None:
    index, state = shards(tmp_path, kind)
    checkpoint = read(index)
    assert checkpoint.format == f"{kind}-sharded" and checkpoint.prefix == "model."
    assert len(checkpoint.shards) == 2
    assert checkpoint.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert_same(checkpoint.tensors, state)
    assert not checkpoint.ties  # every shard has a storage of the same number


def test_sharded_refusals(tmp_path: Path) -> None:
    index, _ = shards(tmp_path, "safetensors")
    good = json.loads(index.read_text())
    for name in ("../a", "/etc/passwd", "a/b", "..", "", "a\\b"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UnsafeError, match="outside"):
            read(index)
    for broken, words in (
        ({}, "no index"),
        ({"weight_map": {"w": "gone"}}, "missing"),
        ({"weight_map": {"w": 1}}, "no index"),
    ):
        index.write_text(json.dumps(broken))
        with pytest.raises(CorruptError, match=words):
            read(index)
    good["weight_map"]["extra"] = "model-00000-of-00002.safetensors"
    index.write_text(json.dumps(good))
    with pytest.raises(CorruptError, match="extra is not in the shard"):
        read(index)


def test_key_for_a_flat_file_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(1))
    with pytest.raises(UsageError, match="--key"):
        read(tmp_path / "a.npz", key="model")


@pytest.mark.parametrize(("framework", "kind"), list(ORDER))
def test_gate_orders_are_permutations_and_invert(framework: str, kind: str) -> None:
    tensor = torch.randn(len(ORDER[framework, kind]) * 5, 3)
    assert torch.equal(from_torch(to_torch(tensor, framework, kind), framework, kind), tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_onnx_exported_by_torch(tmp_path: Path, kind: str, bidirectional: bool, bias: bool) -> None:
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 4, 2, bidirectional=bidirectional, bias=bias)
    torch.onnx.export(nn.Sequential(layer).eval(), (torch.randn(5, 2, 3),), tmp_path / "a.onnx", dynamo=False)
    checkpoint = read(tmp_path / "a.onnx")
    assert checkpoint.format == "onnx" and not checkpoint.skipped
    assert len(checkpoint.module_hints) == 2  # ONNX has one node for each layer
    for index, name in enumerate(checkpoint.module_hints):
        for suffix in ("", "_reverse") if bidirectional else ("",):
            for part in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ())):
                expected = getattr(layer, f"{part}_l{index}{suffix}")
                assert torch.equal(checkpoint.tensors[f"{name}.{part}_l0{suffix}"], expected), (name, part)
        assert checkpoint.module_hints[name].options["bidirectional"] is bidirectional


@pytest.mark.filterwarnings("ignore")
def test_onnx_gru_that_resets_before_the_matmul_is_skipped_by_name(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.onnx.export(nn.GRU(3, 4).eval(), (torch.randn(5, 2, 3),), tmp_path / "a.onnx", dynamo=False)
    model = onnx.load(tmp_path / "a.onnx")
    node = next(node for node in model.graph.node if node.op_type == "GRU")
    next(a for a in node.attribute if a.name == "linear_before_reset").i = 0
    onnx.save(model, tmp_path / "a.onnx")
    checkpoint = read(tmp_path / "a.onnx")
    assert "resets before the matmul" in next(iter(checkpoint.skipped.values()))
    assert not checkpoint.module_hints


def keras_model():
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((5, 3)),
            layers.LSTM(4, return_sequences=True, dropout=0.25),
            layers.Bidirectional(layers.GRU(4, return_sequences=True)),
            layers.SimpleRNN(3, activation="relu", use_bias=False, return_sequences=True),
            layers.GRU(2, reset_after=False, return_sequences=True),
        ]
    )
    for weight in model.weights:
        weight.assign(torch.randn(*weight.shape))
    return model


def sequential(*stack):
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    return keras.Sequential([keras.layers.Input((5, 3)), *[make(keras.layers) for make in stack]])


def hard_cell(layers):
    return layers.RNN(layers.LSTMCell(4, recurrent_activation="hard_sigmoid"))


def relu_backwards(layers):
    return layers.Bidirectional(layers.LSTM(4), backward_layer=layers.LSTM(4, go_backwards=True, activation="relu"))


UNLIKE_TORCH = {
    "backwards": (lambda layers: layers.LSTM(4, go_backwards=True), "backwards"),
    "cell": (hard_cell, "activations"),
    "backwards-cell": (lambda layers: layers.RNN(layers.GRUCell(4), go_backwards=True), "backwards"),
    "stacked": (lambda layers: layers.RNN([layers.LSTMCell(4), layers.LSTMCell(4)]), "stacked"),
    "second-direction": (relu_backwards, "activations"),
    "summed": (lambda layers: layers.Bidirectional(layers.GRU(4), merge_mode="sum"), "merges"),
    "reset-cell": (lambda layers: layers.RNN(layers.GRUCell(4, reset_after=False, use_bias=False)), "resets"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kind", UNLIKE_TORCH)
def test_keras_settings_that_torch_lacks_are_named(tmp_path: Path, kind: str, ending: str) -> None:
    make, word = UNLIKE_TORCH[kind]
    model = sequential(make)
    model.save(tmp_path / f"a.{ending}")
    checkpoint = read(tmp_path / f"a.{ending}")
    assert not checkpoint.module_hints and not checkpoint.assumed
    (reason,) = checkpoint.skipped.values()
    assert word in reason
    numbers = sum(weight.numel() for weight in (variable.value for variable in model.weights))
    assert sum(tensor.numel for tensor in checkpoint.tensors.lazy.values()) == numbers


@pytest.mark.filterwarnings("ignore")
def test_keras_settings_beyond_the_layer_are_said_and_unknown_ones_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    sequential(lambda layers: layers.LSTM(4, name="a")).save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        config = json.loads(file.attrs["model_config"])

    def skipped_and_assumed(change: dict, beside: dict) -> tuple[str, str]:
        layers = config["config"]["layers"]
        changed = [*layers[:-1], beside, {**layers[-1], "config": {**layers[-1]["config"], **change}}]
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file.attrs["model_config"] = json.dumps({**config, "config": {"layers": changed}})
        found = read(tmp_path / "a.h5")
        assert ("a" in found.module_hints) is not ("a" in found.skipped)
        return found.skipped.get("a", ""), found.assumed.get("a", "")

    assert skipped_and_assumed({"zoneout": 0.0, "future": None}, {}) == ("", "")
    for change, word in (({"zoneout": 0.1}, "'zoneout'"), ({"units": 5}, "units=4"), ({"use_bias": False}, "use_bias")):
        reason, assumed = skipped_and_assumed(change, {})
        assert word in reason and not assumed
    for change, beside, word in (
        ({"stateful": True}, {}, "begins with a state of zeros"),
        ({"zero_output_for_mask": True}, {}, "zero_output_for_mask"),
        ({}, {"class_name": "Masking", "config": {"name": "m"}}, "no step is masked"),
        ({}, {"class_name": "Embedding", "config": {"name": "e", "mask_zero": True}}, "no step is masked"),
    ):
        reason, assumed = skipped_and_assumed(change, beside)
        assert word in assumed and not reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["keras", "h5", "weights.h5"])
def test_nested_and_wrapped_keras_layers_are_found_one_by_one(tmp_path: Path, ending: str) -> None:
    def inner(layers):
        first, second = (layers.LSTM(4, return_sequences=True, name=name) for name in ("one", "two"))
        return sys.modules["keras"].Sequential([first, second], name="inner")

    model = sequential(inner, lambda layers: layers.RNN(layers.GRUCell(2), return_sequences=True))
    (model.save_weights if "weights" in ending else model.save)(str(tmp_path / f"a.{ending}"))
    checkpoint = read(tmp_path / f"a.{ending}")
    assert not checkpoint.skipped
    x = torch.randn(2, 5, 3)
    y = x
    in_order = sorted(checkpoint.module_hints.items(), key=lambda item: (item[1].options["mode"] == "GRU", item[0]))
    for name, hint in in_order:
        assert hint.options["bidirectional"] is False
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}[str(hint.options["mode"])]
        own = kind(hint.options["input_size"], hint.options["hidden_size"], batch_first=True)
        state = {n.removeprefix(f"{name}."): t for n, t in checkpoint.tensors.items() if n.startswith(f"{name}.")}
        own.load_state_dict(state)
        y = own(y)[0].detach()
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-5)
    assert set(checkpoint.assumed) == (set(checkpoint.module_hints) if "weights" in ending else set())


@pytest.mark.filterwarnings("ignore")
def test_weights_of_an_early_keras_have_its_defaults(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for version, kept in ((b"2.2.4", False), (b"2.3.0", True)):
        path = tmp_path / f"{kept}.h5"
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = version
            for name, shape in (("kernel:0", (3, 16)), ("recurrent_kernel:0", (4, 16)), ("bias:0", (16,))):
                file[f"lstm_1/lstm_1/{name}"] = np.ones(shape, "f4")
        checkpoint = read(path)
        assert set(checkpoint.module_hints) == ({"lstm_1"} if kept else set())
        assert ("activations" in checkpoint.skipped.get("lstm_1", "")) is not kept


@pytest.mark.parametrize("cls", ["CuDNNLSTM", "CuDNNGRU"])
def test_cudnn_layers_are_named(tmp_path: Path, cls: str) -> None:
    h5py = pytest.importorskip("h5py")
    gates = 4 if cls == "CuDNNLSTM" else 3
    config = {"class_name": "Sequential", "config": [{"class_name": cls, "config": {"name": "fast", "units": 4}}]}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        shapes = {"kernel:0": (3, 4 * gates), "recurrent_kernel:0": (4, 4 * gates), "bias:0": (8 * gates,)}
        for name, shape in shapes.items():
            file[f"model_weights/fast/fast/{name}"] = np.ones(shape, "f4")
    assert cls in read(tmp_path / "a.h5").skipped["fast"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.h5"])
def test_keras_layers_compute_the_same_in_torch(tmp_path: Path, name: str) -> None:
    model = keras_model()
    (model.save_weights if "weights" in name else model.save)(str(tmp_path / name))
    checkpoint = read(tmp_path / name)
    assert checkpoint.format == "keras"
    assert len(checkpoint.skipped) == 1 and "resets before the matmul" in next(iter(checkpoint.skipped.values()))
    x = torch.randn(2, 5, 3)
    layers = [nn.LSTM(3, 4, batch_first=True), nn.GRU(4, 4, batch_first=True, bidirectional=True)]
    layers.append(nn.RNN(8, 3, batch_first=True, bias=False, nonlinearity="relu"))
    order = {"LSTM": 0, "GRU": 1, "RNN": 2}
    names = sorted(checkpoint.module_hints, key=lambda n: order[checkpoint.module_hints[n].options["mode"]])
    for at, (layer, module) in enumerate(zip(layers, names, strict=True)):
        before = f"{module}."
        state = {n.removeprefix(before): t for n, t in checkpoint.tensors.items() if n.startswith(before)}
        layer.load_state_dict(state)
        with torch.no_grad():
            expected, x = model.layers[at](x), layer(x)[0]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    if name != "a.weights.h5":  # which has no configuration
        assert checkpoint.module_hints[names[0]].options["dropout"] == 0.25
        assert checkpoint.module_hints[names[2]].options["nonlinearity"] == "relu"


def test_h5_links_and_outside_numbers_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for index, make in enumerate(
        (
            lambda f: f.__setitem__("a", h5py.ExternalLink("/etc/passwd", "x")),
            lambda f: f.__setitem__("a", h5py.SoftLink("/b")),
            lambda f: f.create_dataset("a", (100,), "f4", external=[("/etc/passwd", 0, 400)]),
        )
    ):
        with h5py.File(tmp_path / f"{index}.h5", "w") as file:
            make(file)
        with pytest.raises(UnsafeError):
            read(tmp_path / f"{index}.h5")
