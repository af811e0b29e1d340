"""The report: what it compares, what it says, what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from kruify import convert, save
from kruify.checkpoint import read
from kruify.errors import CorruptError, UsageError
from kruify.reporting import Report, tables
from kruify.reporting.build import _names
from kruify.reporting.build import report as build
from kruify.tasks.base import Task


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 16)


class Size(Task):
    """Measures the norm of the output, so that its value can be worked out."""

    metric = "norm"

    def model(self) -> nn.Module:
        return Net()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        yield torch.ones(3, 2, 4)

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model.rnn(batch)[0]

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square().mean()

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        with torch.no_grad():
            return {"norm": float(self.forward(model, torch.ones(3, 2, 4)).norm())}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A dense network, one converted with all terms, one with few."""
    net = Net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    source = read(tmp_path / "net.pt").sha256
    save(convert(net, "16*(4x4,4x4)")[0], tmp_path / "exact.kru.safetensors", source_sha256=source)
    save(convert(net, "4x4")[0], tmp_path / "small.kru.safetensors", source_sha256=source)
    return [tmp_path / name for name in ("net.pt", "exact.kru.safetensors", "small.kru.safetensors")]


def text_of(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables(report):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_comparison_that_is_too_wide_has_each_model_beside_the_first(files):
    made = tables(build(*files, task=Size(), latency_seconds=0.0))[0]
    for width, found in ((60, 3), (200, 1)):
        console = Console(file=io.StringIO(), width=width)
        console.print(made)
        text = console.file.getvalue()
        assert text.count("All parameters") == found and text.count("Latency and peak memory:") == 1


def test_a_converted_file_beside_its_source_alone(files):
    """What the first file was made from is left out of the summary, which has one model then."""
    report = build(files[1], files[0], latency_seconds=0.0)
    assert text_of(report).count("in short") == 1


def test_report_compares_with_the_first(files):
    report = build(*files, task=Size(), latency_seconds=0.0)
    first, exact, small, _ = report.models
    assert [m.name for m in report.models] == ["net", "exact", "small", "net (int8)"]
    assert exact.metrics["norm"] == pytest.approx(first.metrics["norm"], rel=1e-4)
    assert small.parameters.recurrent == 3 * 32
    assert small.sources == [first.sha256]
    exact_ratios, small_ratios, _ = report.ratios
    assert small_ratios["recurrent_parameters"] == 768 / 96
    assert exact_ratios["recurrent_parameters"] == 768 / (3 * 16 * 32)
    assert small_ratios["bytes"] == first.weight_bytes / small.weight_bytes
    assert small_ratios["latency"][1] == first.latency_ms[1] / small.latency_ms[1]
    for dense, kru in zip(first.recurrent_matrices, exact.recurrent_matrices, strict=True):
        assert (dense.name, dense.gate) == (kru.name, kru.gate)
        assert kru.spectral_norm == pytest.approx(dense.spectral_norm, rel=1e-4)
    text = text_of(report)
    assert "8.0x smaller" in text
    assert f"{first.metrics['norm']:.4f}" in text
    assert text.index("Recurrent parameters") < text.index("in short")  # which stays in sight


def test_report_without_task_has_no_metrics(files):
    report = build(*files[:2], latency_seconds=0.0)
    assert report.task is report.metric is report.split is None
    value: dict[str, Any] = report.to_json()
    assert value["models"][0]["metrics"] == {}
    json.dumps(value)


def test_files_are_named_by_what_tells_them_apart(files, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "net.pt"
    twin.write_bytes(files[0].read_bytes())
    report = build(files[0], twin, latency_seconds=0.0)
    folder = tmp_path.name
    assert [m.name for m in report.models] == [f"{folder}/net.pt", "other/net.pt", f"{folder}/net.pt (int8)"]
    assert _names(["a.pt", "a.kru.safetensors"]) == ["a.pt", "a.kru.safetensors"]
    assert _names(["a.pt", "b.pt", "a.pt"]) == ["a", "b", "a (3)"]


def test_refusals(files, tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(UsageError, match=r"plain\.pt"):
        build(files[0], tmp_path / "plain.pt", latency_seconds=0.0)
    torch.save(nn.GRU(4, 8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CorruptError, match=r"other\.pt"):
        build(files[0], tmp_path / "other.pt", task=Size(), latency_seconds=0.0)
