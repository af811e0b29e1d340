"""TorchScript archives that run, made small from samples; the outputs are compared by the archive and kruify.load."""

from __future__ import annotations

import json
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
from kruify.search.layer_modules import dense_module
from kruify.search.program_compression import compress_program
from kruify.search.scripted import ScriptedNetwork, load_script


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
    network, calls = ScriptedNetwork(load_script(archive), modules), dict.fromkeys(modules, 0)
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
    with pytest.raises(UsageError, match="Name the arrays as the arguments"):
        compress_program(archive, [{"y": np.zeros(3)}] * 2, "4x", output)
    (tmp_path / "none.pt").write_bytes(b"no archive")
    with pytest.raises(UnsupportedError, match="torch cannot load it"):
        load_script(tmp_path / "none.pt")
    assert not output.exists()
