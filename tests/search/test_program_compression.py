"""TorchScript archives that run, made small from samples; the outputs are compared by the archive and kruify.load."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kruify
from kruify.cli.main import cli
from kruify.conversion.locate import locate_checkpoint
from kruify.errors import UnsupportedError, UsageError
from kruify.search.keras_program import KerasProgram
from kruify.search.layer_modules import dense_module
from kruify.search.program_compression import compress_program
from kruify.search.scripted import Script


class Parts(nn.Module):
    """A GRU, batch first, and a cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.GRU(24, 16, batch_first=True), nn.LSTMCell(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)[0]
        h = c = torch.zeros(x.shape[1], 16)
        for step in range(y.shape[0]):
            h, c = self.cell(y[step], (h, c))
        return y, h


class Net(nn.Module):
    """These, and an LSTM of two directions and layers with a projection, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last = Parts(), nn.LSTM(16, 8, bidirectional=True, num_layers=2, proj_size=3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.parts(x)
        packed = self.last(pack_padded_sequence(y, lengths, enforce_sorted=False))[0]
        return pad_packed_sequence(packed)[0], h


BASIS = np.random.default_rng(0).standard_normal((3, 24))


def samples() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(1)
    for _ in range(4):
        x = (rng.standard_normal((12, 4, 3)) @ BASIS).astype(np.float32)
        yield {"x": x}


def saved(network: nn.Module, path: Path) -> Path:
    torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    return Parts().eval()


@pytest.fixture(scope="module")
def archive(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(parts, tmp_path_factory.mktemp("archive") / "model.ts.pt")


def test_modules_in_the_place_of_the_layers_give_what_the_archive_gives(tmp_path: Path) -> None:
    net = Net().eval()
    archive = saved(net, tmp_path / "net.pt")
    checkpoint = kruify.checkpoint.read(archive)
    layers = {layer.name: layer for layer in locate_checkpoint(checkpoint).layers}
    modules = {name: dense_module(layer, checkpoint.tensors, archive) for name, layer in layers.items()}
    network, calls = Script(archive, modules).network(modules), dict.fromkeys(modules, 0)
    for name in modules:

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        network.get_submodule(name).register_forward_hook(count)
    x, lengths = torch.from_numpy(next(samples())["x"]), torch.tensor([12, 3, 7, 5])
    with torch.no_grad():
        found, wanted = network(x=x, lengths=lengths), net(x, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert calls == {"parts.first": 1, "parts.cell": 12, "last": 1}


def test_an_archive_becomes_small(parts: Parts, archive: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.kru.safetensors"
    found = compress_program(archive, samples, "params=30%", small, steps=20, lr=1e-2)
    (attempt,) = found.attempts
    assert [layer.name for layer in attempt.layers] == ["first", "cell"]
    assert all(layer.steps == 20 and layer.error_after <= layer.error_before for layer in attempt.layers)
    assert attempt.bytes == small.stat().st_size < 0.3 * found.before
    network = kruify.load(small, into=Parts().eval())
    x = torch.from_numpy(list(samples())[1]["x"])  # held out
    with torch.no_grad():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(network(x), parts(x), strict=True)]
    assert [attempt.outputs[n].relative_error for n in "01"] == pytest.approx(errors, rel=1e-3)
    assert max(errors) < 0.3


def test_an_archive_that_fits_in_eight_bits_keeps_its_matrices(archive: Path, tmp_path: Path) -> None:
    found = compress_program(archive, samples, "size=2x", tmp_path / "small.safetensors")
    assert found.attempts[0].layers == [] and found.attempts[0].outputs["0"].relative_error < 0.02
    assert compress_program(archive, samples, "size=2x", tmp_path / "dry.safetensors", dry_run=True).seconds is None


def test_an_archive_runs_only_where_it_is_asked_for(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    for number, sample in enumerate(samples()):
        np.savez(f"samples/{number}.npz", **sample)
    command = ["compress", str(archive), "--inputs", "samples", "--budget", "4x", "--steps", "2", "-o", "a.st"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was run"))
        refused = CliRunner().invoke(cli, command)
    assert refused.exit_code == 2 and "Add --run" in refused.stderr
    dry = CliRunner().invoke(cli, [*command, "--run", "--json", "--dry-run"])
    plan = json.loads(dry.stdout)
    assert dry.exit_code == 0 and not Path("a.st").exists() and plan["seconds"] > 0
    assert plan["budget"][0]["used"] == plan["parameters"]["recurrent_after"] <= plan["budget"][0]["allowed"]
    result = CliRunner().invoke(cli, [*command, "--run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["files"] == ["a.st"] and found["bytes"]["after"] == Path("a.st").stat().st_size
    for more, message in (
        (["--max-drop", "1"], "--max-drop does not go with --run"),
        (["--attempts", "4"], "--attempts does not go with --run"),
        (["--task", "x.py:y"], "no --task"),
    ):
        refused = CliRunner().invoke(cli, [*command, "--run", *more])
        assert refused.exit_code == 2 and message in refused.stderr
    refused = CliRunner().invoke(cli, ["compress", "x.pt", "--task", "x", "--budget", "2x", "--run", "-o", "y.pt"])
    assert refused.exit_code == 2 and "go with --inputs" in refused.stderr


def test_what_cannot_be_run_is_said(archive: Path, tmp_path: Path) -> None:
    torch.save(nn.GRU(2, 2).state_dict(), tmp_path / "state.pt")
    output = tmp_path / "small.safetensors"
    with pytest.raises(UsageError, match="no program that runs"):
        compress_program(tmp_path / "state.pt", samples, "4x", output)
    for names, message in (("y", "the sample lacks the input 'x'"), ("xy", r"it has no input 'y': it takes x\)")):
        with pytest.raises(UsageError, match=message):
            compress_program(archive, [dict.fromkeys(names, np.zeros((3, 4, 24), np.float32))] * 2, "4x", output)
    with pytest.raises(UsageError, match="/proc/self: the folder cannot be written to"):
        compress_program(archive, samples, "4x", output, resume="/proc/self")
    (tmp_path / "none.pt").write_bytes(b"no archive")
    with pytest.raises(UnsupportedError, match="torch cannot load it"):
        Script(tmp_path / "none.pt", [])
    assert not output.exists()


class Refuses(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 4:
            raise ValueError("four are too many")
        return self.parts_of(x)

    @torch.jit.export
    def parts_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x)[0], x


class Rounds(Refuses):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)[0]
        return y.to(torch.bfloat16), y


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((12, 4, 24), np.float32), "four are too many"),
        (np.zeros((12, 3, 25), np.float32), "RuntimeError"),
        (np.array(["a"]), "'x' of a sample is no tensor"),
        (np.array(["2020-01-01"], "datetime64[D]"), "'x' of a sample is no tensor"),
    ],
)
def test_whatever_the_program_raises_is_one_error(x: Any, message: str, tmp_path: Path) -> None:
    archive = saved(Refuses(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match=message):
        compress_program(archive, [{"x": x}] * 2, "4x", tmp_path / "small.safetensors")
    assert [*tmp_path.iterdir()] == [archive]


def test_arrays_of_another_byte_order_and_bfloat16_outputs(tmp_path: Path) -> None:
    archive = saved(Rounds(), tmp_path / "net.pt")
    swapped = [{"x": sample["x"].astype(">f4")} for sample in samples()]
    found = compress_program(archive, swapped, "params=60%", tmp_path / "small.safetensors", steps=0)
    errors = found.attempts[0].outputs
    assert errors["0"].relative_error == pytest.approx(errors["1"].relative_error, rel=0.05)


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs; states handed on; sequences and last steps given; both kinds of direction."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x, start = layers.Input((None, 24), name="x"), layers.Input((16,), name="start")
    y, h, c = layers.LSTM(16, return_sequences=True, return_state=True)(x)
    y = layers.Bidirectional(layers.GRU(16, return_sequences=True))(y, initial_state=[h, c])
    last = layers.Bidirectional(layers.LSTM(8))(y)
    y = layers.SimpleRNN(16, activation="relu")(y, initial_state=start)
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    keras.Model([x, start], [layers.Dense(4)(y), last]).save(path)
    return path


def keras_samples() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(2)
    for sample in samples():
        yield {"x": sample["x"], "start": rng.standard_normal((12, 16)).astype(np.float32)}


def test_modules_in_the_place_of_the_layers_give_what_a_keras_model_gives(keras_file: Path) -> None:
    import keras

    checkpoint = kruify.checkpoint.read(keras_file)
    layers = {layer.name: layer for layer in locate_checkpoint(checkpoint).layers}
    program = KerasProgram(keras_file, list(layers.values()), checkpoint.tensors.lazy)
    assert set(program.layers) == set(layers) and len(layers) == 4
    modules = {name: dense_module(layer, checkpoint.tensors, keras_file) for name, layer in layers.items()}
    model, sample = keras.saving.load_model(keras_file), next(keras_samples())
    found = program.network(modules)(**{name: torch.from_numpy(array) for name, array in sample.items()})
    wanted = model([sample["x"], sample["start"]])
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), keras.ops.convert_to_numpy(b), atol=1e-5)
    with torch.no_grad():
        for module in modules.values():
            module.weight_hh_l0 *= 0
    silent = program.network(modules)(**{name: torch.from_numpy(array) for name, array in sample.items()})
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(silent, found, strict=True))  # they did answer


def test_a_keras_model_becomes_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    original, small, again = (tmp_path / name for name in ("a.keras", "a.kru.safetensors", "b.keras"))
    keras.Sequential([keras.layers.Input((None, 24), name="x"), keras.layers.GRU(16)]).save(original)
    monkeypatch.delenv("KERAS_BACKEND")
    found = compress_program(original, samples, "params=40%", small, steps=10, lr=1e-2)
    assert "KERAS_BACKEND" not in os.environ
    (attempt,) = found.attempts
    assert [layer.name for layer in attempt.layers] == ["gru"] and attempt.layers[0].steps == 10
    kruify.export(small, "dense", again, original=original)
    x = list(samples())[1]["x"]  # held out
    wanted, got = (keras.ops.convert_to_numpy(keras.saving.load_model(path)(x)) for path in (original, again))
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert attempt.outputs["0"].relative_error == pytest.approx(error, rel=1e-2)


def test_masks_and_states_that_are_carried_over_are_not_followed(tmp_path: Path) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras")
    layers, path = keras.layers, tmp_path / "model.keras"
    stack = [layers.Input((6, 3), batch_size=2), layers.Masking(), layers.GRU(8, return_sequences=True)]
    keras.Sequential([*stack, layers.LSTM(8, stateful=True)]).save(path)
    checkpoint = kruify.checkpoint.read(path)
    found = locate_checkpoint(checkpoint).layers
    program = KerasProgram(path, found, checkpoint.tensors.lazy)
    assert [*program.layers] == ["gru"] and len(found) == 2
    network = program.network({"gru": nn.GRU(3, 8)})
    with pytest.raises(UnsupportedError, match="a mask reaches"):
        network(**{program.model.inputs[0].name: torch.ones(2, 6, 3)})
