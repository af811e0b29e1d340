"""Every kind of file that torch writes, read without running it, against torch's own loaders."""

from __future__ import annotations

import collections
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kruify.checkpoint import read
from kruify.errors import CorruptError, UnsafeError, UnsupportedError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.25, bidirectional=True)
        self.gru = nn.GRU(8, 4, batch_first=True, bias=False)
        self.cell = nn.RNNCell(4, 5, nonlinearity="relu")
        self.head = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.activation = torch.nn.functional.relu

    def forward(self, x):
        y = self.gru(self.rnn(x)[0])[0]
        return self.cell(y[:, 0]), self.head(y)


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def odd_state() -> dict:
    torch.manual_seed(0)
    flat = torch.randn(100)
    return {
        "slice": flat[10:30].view(4, 5),
        "transposed": flat[30:60].view(5, 6).t(),
        "strided": flat[::7],
        "parameter": nn.Parameter(torch.randn(3).half()),
        "brain": torch.randn(3, 1).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "complex": torch.randn(2, 2, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "expanded": torch.tensor([1.0]).expand(5, 2),
        "list": [1, 2.5, None],
    }


@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}]
)
def test_state_dicts_equal_torch_load(tmp_path: Path, options: dict) -> None:
    state = odd_state()
    if "_use_new_zipfile_serialization" in options:  # torch itself cannot read these from an old file
        del state["unsigned"], state["float8"]
    torch.save(collections.OrderedDict(state), tmp_path / "a.pt", **options)
    expected = torch.load(tmp_path / "a.pt", weights_only="pickle_protocol" not in options)
    checkpoint = read(tmp_path / "a.pt")
    assert checkpoint.format == ("torch-legacy" if "_use_new_zipfile_serialization" in options else "torch")
    assert_same(checkpoint.tensors, {name: t for name, t in expected.items() if name != "list"})
    assert any("list" in notice for notice in checkpoint.dropped)


GONE = """
import torch
class Gone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4, batch_first=True)
        self.vocabulary = {"a": 1}
model = torch.nn.DataParallel(Gone())
for zipped in (True, False):
    torch.save(model, f"plain-{zipped}.pt", _use_new_zipfile_serialization=zipped)
    torch.save({"model": model, "epoch": 2}, f"nested-{zipped}.pt", _use_new_zipfile_serialization=zipped)
torch.save(model.module.state_dict(), "state.pt")
"""


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of whole modules whose class exists in another process only."""
    folder = tmp_path_factory.mktemp("gone")
    subprocess.run([sys.executable, "-W", "ignore", "-c", GONE], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["plain", "nested"])
def test_full_modules_are_read_without_their_class(gone: Path, zipped: bool, how: str) -> None:
    checkpoint = read(gone / f"{how}-{zipped}.pt")
    assert checkpoint.format == "torch-module"
    assert checkpoint.prefix == "module."
    assert checkpoint.key == ("model" if how == "nested" else None)
    assert_same(checkpoint.tensors, torch.load(gone / "state.pt", weights_only=True))
    assert "__main__.Gone" in checkpoint.globals
    hint = checkpoint.module_hints["rnn"]
    assert not hint.is_subclass
    assert hint.options["batch_first"] is True and hint.options["mode"] == "GRU"


def test_full_modules_say_what_state_dicts_do_not(tmp_path: Path) -> None:
    model = Net()
    torch.save(model, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert_same(checkpoint.tensors, model.state_dict())
    assert checkpoint.module_hints["rnn"].options["dropout"] == 0.25
    assert checkpoint.module_hints["cell"].options["nonlinearity"] == "relu"


class MyLSTM(nn.LSTM):
    pass


def test_subclasses_are_told(tmp_path: Path) -> None:
    torch.save(nn.Sequential(MyLSTM(2, 3)), tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").module_hints["0"].is_subclass


def test_tied_modules_are_ties(tmp_path: Path) -> None:
    gru = nn.GRU(2, 3, bias=False)
    torch.save(nn.ModuleList([gru, gru]), tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").ties == {"1.weight_ih_l0": "0.weight_ih_l0", "1.weight_hh_l0": "0.weight_hh_l0"}


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives(tmp_path: Path, how: str) -> None:
    model = Net().eval()
    compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 5, 3))
    compiled.save(tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    expected = {**model.state_dict(), "scratch": model.scratch}  # TorchScript keeps buffers that are not persistent
    assert checkpoint.format == "torchscript"
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())
    options = checkpoint.module_hints["rnn"].options
    assert options["batch_first"] is True and options["dropout"] == 0.25 and options["num_layers"] == 2
    assert not checkpoint.module_hints["gru"].is_subclass


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="quantised"):
        read(tmp_path / "a.pt")


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="sparse"):
        read(tmp_path / "a.pt")


def test_lightning_checkpoints(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in nn.GRU(2, 3).state_dict().items()}
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "lr_schedulers": [],
        "hyper_parameters": {"hidden": 3, "path": Path("/tmp")},
    }
    torch.save(content, tmp_path / "a.ckpt")
    checkpoint = read(tmp_path / "a.ckpt")
    assert checkpoint.key == "state_dict" and checkpoint.prefix == "model."
    assert checkpoint.extras == {"epoch": 1, "pytorch-lightning_version": "2.4.0"}
    assert len(checkpoint.dropped) == 3  # the optimizer, the schedulers, and parameters that hold a class
    assert "pathlib.PosixPath" in checkpoint.globals


def test_two_whole_modules_need_a_key(tmp_path: Path) -> None:
    torch.save({"model": nn.GRU(2, 3), "ema": nn.GRU(2, 3)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="--key"):
        read(tmp_path / "a.pt")
    assert read(tmp_path / "a.pt", key="ema").format == "torch-module"


def test_a_plain_pickle_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(UnsupportedError, match="plain pickle"):
        read(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cos\nsystem\nU\x02id\x85R.")
    with pytest.raises(UnsafeError, match=r"os\.system"):
        read(tmp_path / "a.pkl")


def test_every_truncation_of_a_legacy_file_is_corrupt(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(nn.GRU(2, 3).state_dict(), buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    for keep in range(30, len(data), 37):
        (tmp_path / "a.pt").write_bytes(data[:keep])
        with pytest.raises(CorruptError):
            read(tmp_path / "a.pt")


def test_a_file_may_be_called_by_the_time_of_day(tmp_path: Path) -> None:
    """torch names the folder inside the archive after the file."""
    torch.save({"w": torch.ones(2)}, tmp_path / "10:30:00.pt")
    assert torch.equal(read(tmp_path / "10:30:00.pt").tensors["w"], torch.ones(2))
