"""The dense network in eight bits by torch, in a report: against torch's own function called by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from kruify import convert, save
from kruify.reporting import Report, to_html, to_markdown
from kruify.reporting.build import report
from kruify.reporting.rows import headlines, latency_note, title
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
    first, _, int8 = made.models
    own = quantize_dynamic(net, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert int8.metrics == Size().evaluate(own, "test") != first.metrics
    assert int8.metrics["size"] == pytest.approx(first.metrics["size"], rel=0.05)
    numbers = 64 * (4 + 16) + 3 * 16
    assert first.weight_bytes - int8.weight_bytes == first.bytes - int8.bytes == 3 * numbers - 3 * 16
    assert int8.latency_ms.keys() == int8.peak_memory_bytes.keys() == first.latency_ms.keys()
    assert int8.name == "net (int8)" and not made.without_int8 and made.ratios[1]["bytes"] > 2
    assert [h.model for h in headlines(made)] == ["small"]
    assert "int8" not in title(made)
    assert "net (int8)" in to_markdown(made) and "net (int8)" in to_html(made)
    json.dumps(made.to_json())


def test_without_a_task_the_recurrent_layers_are_quantised(tmp_path: Path) -> None:
    first, _, int8 = compared(Net(), tmp_path).models
    assert first.weight_bytes - int8.weight_bytes == 3 * 64 * (4 + 16) - 2 * 16


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
    assert len(made.models) == 2 and made.without_int8 and why in made.without_int8
    assert f"net (int8) by torch's dynamic quantisation is missing: {made.without_int8}." in latency_note(made)


def test_a_torch_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.ao.quantization.quantize_dynamic")
    assert "no quantize_dynamic" in compared(Net(), tmp_path).without_int8


def test_a_converted_file_has_no_contender(tmp_path: Path) -> None:
    compared(Net(), tmp_path)
    files = [tmp_path / "small.kru.safetensors"] * 2
    made = report(*files, latency_seconds=0.0)
    assert len(made.models) == 2 and not made.without_int8
