"""The dense network in eight bits by torch and ONNX Runtime, in a report: against their functions called by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from kruify import convert, save
from kruify.analysis.contender import onnxruntime_int8
from kruify.analysis.layers import layers_of
from kruify.checkpoint import read
from kruify.errors import UnsupportedError
from kruify.reporting import Report, to_html, to_markdown
from kruify.reporting.build import report
from kruify.reporting.rows import latency_note, summary, title
from kruify.tasks.base import Task

X = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Size(Task):
    metric = "size"

    def model(self) -> nn.Module:
        return Net()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        yield X

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square().mean()

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        with torch.no_grad():
            return {"size": float(model(X).norm())}


class NeedsWeights(Size):
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return {"size": float(next(model.rnn.parameters()).detach().norm())}  # type: ignore[union-attr, operator]


def compared(net: nn.Module, folder: Path, task: Task | None = None) -> Report:
    torch.save(net.state_dict(), folder / "net.pt")
    small, _ = convert(net, "2*(4x4,4x4)")
    save(small, folder / "small.kru.safetensors")
    return report(folder / "net.pt", folder / "small.kru.safetensors", task=task, latency_seconds=0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_torchs_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    made = compared(net, tmp_path, Size())
    first, _, int8, *others = made.models
    own = quantize_dynamic(net, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert int8.metrics == Size().evaluate(own, "test") != first.metrics
    assert int8.metrics["size"] == pytest.approx(first.metrics["size"], rel=0.05)
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    assert int8.bytes == len(file.getvalue()) > int8.weight_bytes
    numbers = 64 * (4 + 16) + 3 * 16
    assert numbers < int8.weight_bytes < numbers + 4 * (2 * 64 + 3) + 200  # float32 biases, scales, zero points
    assert int8.latency_ms.keys() == int8.peak_memory_bytes.keys() == first.latency_ms.keys()
    assert int8.name == "net (int8)" and not made.without_int8 and made.ratios[1]["bytes"] > 1.5
    assert [other.name for other in others] == ["net (int8, ONNX Runtime)"] * bool(find_spec("onnxruntime"))
    assert [m.name for m in summary(made).models if not m.is_rival][1:] == ["small"]
    assert "int8" not in title(made)
    assert "net (int8)" in to_markdown(made) and "net (int8)" in to_html(made)
    json.dumps(made.to_json())


def test_without_a_task_the_recurrent_layers_are_quantised(tmp_path: Path) -> None:
    first, _, int8, *_ = compared(Net(), tmp_path).models
    assert 2 * 64 * (4 + 16) < first.weight_bytes - int8.weight_bytes <= 3 * 64 * (4 + 16)


def test_onnxruntime_computes_what_it_makes_of_the_layer(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = Net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    found = onnxruntime_int8(layers_of(read(tmp_path / "net.pt")))
    (layer,) = found.layers.modules()
    with torch.no_grad():
        wanted = net.rnn(X)[0]
        assert 1e-5 < (layer(X) - wanted).abs().max() < 0.2  # eight bits, and no more
    assert found.weight_bytes < 64 * (4 + 16) + 4 * (2 * 64 + 3 * 17) + 3000  # nodes and names are a kilobyte or two
    torch.save(nn.GRU(4, 8).state_dict(), tmp_path / "gru.pt")
    with pytest.raises(UnsupportedError, match="no layer but LSTM"):
        onnxruntime_int8(layers_of(read(tmp_path / "gru.pt")))


@pytest.mark.parametrize(
    ("net", "task", "why"),
    [
        (nn.RNN(4, 8), None, "no eight-bit form"),
        (nn.LSTM(4, 8, proj_size=4), None, ""),
        (nn.GRU(4, 8).double(), None, ""),
        (Net(), NeedsWeights(), "StopIteration"),
    ],
)
def test_what_torch_cannot_quantise_is_said(net: nn.Module, task: Task | None, why: str, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    made = report(tmp_path / "net.pt", tmp_path / "net.pt", task=task, latency_seconds=0.0)
    assert len([m for m in made.models if "ONNX" not in m.name]) == 2
    assert made.without_int8 and why in made.without_int8
    assert f"net (int8) by torch's dynamic quantisation is missing: {made.without_int8}." in latency_note(made)


def test_a_torch_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.ao.quantization.quantize_dynamic")
    assert "no quantize_dynamic" in compared(Net(), tmp_path).without_int8


def test_a_converted_file_has_no_contender(tmp_path: Path) -> None:
    compared(Net(), tmp_path)
    files = [tmp_path / "small.kru.safetensors"] * 2
    made = report(*files, latency_seconds=0.0)
    assert len(made.models) == 2 and not made.without_int8
