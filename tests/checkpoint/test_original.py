"""Files of the original kind with other weights: the original library opens them and finds the new weights."""

from __future__ import annotations

import collections
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations

from kruify.checkpoint import origin, read, write_original, write_safetensors
from kruify.errors import CorruptError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 2)
        self.tied = self.head

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def other(checkpoint, seed: int = 1) -> dict[str, torch.Tensor]:
    """New numbers for every tensor, the same for ties."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in checkpoint.tensors.items():
        first = checkpoint.ties.get(name)
        new = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        found[name] = found[first] if first else new
    return found


def rewritten(path: Path, key: str | None = None, **options) -> tuple[Path, dict[str, torch.Tensor]]:
    before = path.read_bytes()
    checkpoint = read(path, key)
    tensors = other(checkpoint)
    target = path.with_name(f"new-{path.name}")
    write_original(target, tensors, origin(checkpoint), **options)
    assert path.read_bytes() == before
    return target, tensors


@pytest.mark.parametrize("legacy", [False, True])
def test_nested_wrapped_state_dict(tmp_path: Path, legacy: bool) -> None:
    state = {f"module.{name}": tensor for name, tensor in Net().state_dict().items()}
    content = {"epoch": 3, "model_state_dict": state, "optimizer": {"a": torch.ones(1)}, "args": {"lr": 0.1}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    target, tensors = rewritten(tmp_path / "a.pt")
    loaded = torch.load(target, weights_only=True)
    assert zipfile.is_zipfile(target) is not legacy
    assert (
        loaded["epoch"] == 3 and loaded["args"] == {"lr": 0.1} and set(loaded) == {"epoch", "model_state_dict", "args"}
    )
    assert list(loaded["model_state_dict"]) == list(state)
    model = nn.DataParallel(Net())
    model.load_state_dict(loaded["model_state_dict"])
    assert torch.equal(model.module.rnn.weight_hh_l1, tensors["rnn.weight_hh_l1"])
    assert loaded["model_state_dict"]["module.tied.weight"] is not None
    assert read(target).ties == read(tmp_path / "a.pt").ties != {}


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": tensor for name, tensor in nn.GRU(2, 3).state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    target, tensors = rewritten(tmp_path / "a.safetensors")
    found = safetensors.torch.load_file(target)
    assert {f"_orig_mod.{name}" for name in tensors} == set(found)
    assert read(target).metadata == {"format": "pt"}


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in nn.GRU(2, 3).state_dict().items()})
    target, tensors = rewritten(tmp_path / "a.npz")
    with np.load(target) as arrays:
        assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in tensors.items())


def test_sharded(tmp_path: Path) -> None:
    state = nn.LSTM(2, 3).state_dict()
    table = {}
    for index, name in enumerate(state):
        table[name] = f"part-{index % 2}.safetensors"
    for shard in set(table.values()):
        safetensors.torch.save_file({n: state[n] for n in table if table[n] == shard}, tmp_path / shard)
    (tmp_path / "a.index.json").write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": table}))
    checkpoint = read(tmp_path / "a.index.json")
    with pytest.raises(UsageError, match="there already"):
        write_original(tmp_path / "b.index.json", other(checkpoint), origin(checkpoint))
    (tmp_path / "out").mkdir()
    write_original(tmp_path / "out/a.index.json", other(checkpoint), origin(checkpoint))
    assert sorted(os.listdir(tmp_path / "out")) == ["a.index.json", "part-0.safetensors", "part-1.safetensors"]
    assert json.loads((tmp_path / "out/a.index.json").read_text())["weight_map"] == table


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_whole_modules(tmp_path: Path, legacy: bool, nested: bool) -> None:
    content = {"model": nn.DataParallel(Net()), "epoch": 1} if nested else nn.DataParallel(Net())
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    target, tensors = rewritten(tmp_path / "a.pt", source=tmp_path / "a.pt")
    loaded = torch.load(target, weights_only=False)
    model = loaded["model"] if nested else loaded
    assert all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in tensors.items())
    checkpoint = read(tmp_path / "a.pt")
    with pytest.raises(UsageError, match="original file"):
        write_original(target, tensors, origin(checkpoint))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path: Path, how: str) -> None:
    model, x = Net().eval(), torch.randn(2, 5, 3)
    (torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)).save(tmp_path / "a.pt")
    target, tensors = rewritten(tmp_path / "a.pt", source=tmp_path / "a.pt")
    model.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(torch.jit.load(target)(x), model(x))
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(20.0)
        self.register_buffer("a", flat[::2])
        self.register_buffer("b", flat[1::2].view(5, 2).t())


def test_strided_views_of_one_storage(tmp_path: Path) -> None:
    torch.save(Views(), tmp_path / "a.pt")
    target, tensors = rewritten(tmp_path / "a.pt", source=tmp_path / "a.pt")
    found = read(target).tensors
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["b"], tensors["b"])


def test_weight_norm_is_written_as_it_was(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")

    torch.save(make().state_dict(), tmp_path / "a.pt")
    target, tensors = rewritten(tmp_path / "a.pt")
    model = make()
    model.load_state_dict(torch.load(target, weights_only=True))
    torch.testing.assert_close(model.weight_hh_l0.detach(), tensors["weight_hh_l0"])
    assert list(torch.load(target)) == list(make().state_dict())


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x = Net().eval(), torch.randn(2, 5, 3)
    torch.onnx.export(model, (x,), tmp_path / "a.onnx", dynamo=False)
    checkpoint = read(tmp_path / "a.onnx")
    target, tensors = rewritten(tmp_path / "a.onnx", source=tmp_path / "a.onnx")
    onnx.checker.check_model(target)
    for index, layer in enumerate(checkpoint.module_hints):
        for name, tensor in tensors.items():
            if name.startswith(f"{layer}."):
                short = name.removeprefix(f"{layer}.").replace("_l0", f"_l{index}")
                getattr(model.rnn, short).data.copy_(tensor)
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in checkpoint.module_hints}
    initial = [tensor for name, tensor in rest.items() if "/rnn/Constant" in name]  # h and c of both layers
    for name, tensor in rest.items():
        for own, parameter in model.head.named_parameters():
            if f"head.{own}" == name:
                parameter.data.copy_(tensor)
            elif "MatMul" in name and own == "weight":
                parameter.data.copy_(tensor.t())
    session = runtime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model.head(model.rnn(x, (torch.cat(initial[::2]), torch.cat(initial[1::2])))[0])
    torch.testing.assert_close(torch.from_numpy(found), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.h5"])
def test_keras(tmp_path: Path, name: str) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((5, 3)),
            layers.Bidirectional(layers.GRU(4, return_sequences=True)),
            layers.LSTM(3, return_sequences=True),
            layers.Dense(2),
        ]
    )
    (model.save_weights if "weights" in name else model.save)(str(tmp_path / name))
    target, tensors = rewritten(tmp_path / name, source=tmp_path / name)
    x = torch.randn(2, 5, 3)
    if "weights" in name:
        model.load_weights(str(target))
    else:
        model = keras.models.load_model(str(target), compile=False)
    hints = read(target).module_hints
    gru = next(n for n in hints if hints[n].options["mode"] == "GRU")
    own = nn.GRU(3, 4, batch_first=True, bidirectional=True)
    own.load_state_dict({n.removeprefix(f"{gru}."): t for n, t in tensors.items() if n.startswith(f"{gru}.")})
    torch.testing.assert_close(own(x)[0], model.layers[0](x), rtol=1e-5, atol=1e-5)


EXTRAS = {
    "vocabulary": {0: "<pad>", 1: "zebra", 2: "apple"},
    "shape": (1, (2, 3)),
    "nothing": None,
    "ordered": collections.OrderedDict(z=1, a=[(True, 2.5)]),
    "classes": {"b", "a"},
    "frozen": frozenset([1]),
    "dtype": torch.float16,
    "device": torch.device("cuda", 0),
    "size": torch.Size([2, 3]),
    "raw": b"\xff\0",
    "buffer": bytearray(b"\xfe"),
    "range": range(9, 1, -3),
    "z": 1 + 2j,
    "$": {"$": "dict"},
    "large": 1 << 100,
    "infinite": float("-inf"),
}


def typed(value: object) -> object:
    """Types and order are compared, too."""
    if isinstance(value, dict):
        return type(value), [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(v) for v in value]
    return type(value), value


@pytest.mark.parametrize("before", [0, 3])
def test_values_beside_the_state_dict_keep_types_and_order(tmp_path: Path, before: int) -> None:
    items = list(EXTRAS.items())
    whole = {**dict(items[:before]), "model": nn.GRU(2, 3).state_dict(), **dict(items[before:])}
    torch.save(whole, tmp_path / "a.pt")
    target, _ = rewritten(tmp_path / "a.pt")
    written = torch.load(target, weights_only=False)
    assert list(written) == list(whole)
    assert typed({**written, "model": None}) == typed({**whole, "model": None})


def test_what_stands_in_two_places_beside_the_state_dict_stays_one(tmp_path: Path) -> None:
    words, table = ["a"], {0: "b"}
    torch.save({"words": words, "model": nn.GRU(2, 3).state_dict(), "more": (words, table, [table])}, tmp_path / "a.pt")
    written = torch.load(rewritten(tmp_path / "a.pt")[0])
    again, kept, (inner,) = written["more"]
    assert written["words"] is again == words and kept is inner == table


class Vocabulary:
    pass


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"words": Vocabulary()}, "words"),
        ({"counts": collections.Counter("ab")}, "counts"),
        ({"keyed": {(1, 2): 3}}, "keyed"),
        ({"best": torch.ones(2)}, "best"),
        ({7: "seven"}, "int"),
    ],
)
def test_values_that_cannot_be_kept_are_named(tmp_path: Path, beside: dict, named: str) -> None:
    torch.save({"model": nn.GRU(2, 3).state_dict(), **beside}, tmp_path / "a.pt")
    (sentence,) = read(tmp_path / "a.pt").dropped
    assert named in sentence and "left out" in sentence


def test_entries_beside_a_deeper_state_dict_are_named(tmp_path: Path) -> None:
    torch.save({"run": {"model": nn.GRU(2, 3).state_dict(), "epoch": 3}}, tmp_path / "a.pt")
    (sentence,) = read(tmp_path / "a.pt").dropped
    assert "beside run.model" in sentence


def test_the_metadata_of_an_index_keep_their_types(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a-1.safetensors", {"w": torch.ones(2, 2)})
    index = {"metadata": {"total_size": 16}, "weight_map": {"w": "a-1.safetensors"}}
    (tmp_path / "a.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    checkpoint = read(tmp_path / "a.index.json")
    write_original(tmp_path / "out/a.index.json", checkpoint.tensors, origin(checkpoint))
    assert json.loads((tmp_path / "out/a.index.json").read_text()) == index


@pytest.mark.parametrize(
    "bad",
    [
        '{"$": "os", "items": 1}',
        '{"$": "set", "items": [[]]}',
        '{"$": "dtype"}',
        '{"$": []}',
        '[{"$": "same", "items": 0}]',
        '{"$": "same", "items": 7}',
        '{"$": "same", "items": {}}',
    ],
)
def test_a_damaged_note_of_extras_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(CorruptError, match="note of the original"):
        write_original(tmp_path / "a.pt", {"w": torch.ones(2)}, f'{{"format": "torch", "extras": {{"a": {bad}}}}}')


def test_origin_is_the_same_each_time_and_plain(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"model": nn.GRU(2, 3).state_dict(), "best": 0.5}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    first, second = (origin(read(tmp_path / "a.pt")) for _ in range(2))
    assert first == second
    assert json.loads(first)["extras"] == {"best": 0.5}
