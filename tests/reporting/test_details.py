"""Energies, peak memory and what a file tells about its making."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from kruify import save
from kruify.analysis.latency import measure_latency
from kruify.analysis.layers import layers_of
from kruify.analysis.matrices import matrix_health
from kruify.checkpoint import metadata_for, read, write_safetensors
from kruify.cli.main import cli
from kruify.conversion import convert, convert_tensors
from kruify.conversion.locate import locate
from kruify.conversion.plan import make_plan
from kruify.reporting.details import agreeing, history, peak_memory, provenance, with_energies


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, list[float]]:
    """A dense file, its conversion, the energies that the decomposition itself found."""
    state = nn.GRU(4, 16).state_dict()
    write_safetensors(tmp_path / "dense.safetensors", state)
    located = locate(state)
    conversion = convert_tensors(state, make_plan(located.layers, "4x4,4x4"), located)
    extra = {"kruify.history": json.dumps([{"epoch": 0, "loss": None, "metrics": {"m": 1.0}}])}
    metadata = metadata_for(conversion.plan.to_json(), seed=7, extra=extra)
    write_safetensors(tmp_path / "small.safetensors", conversion.tensors, metadata)
    return tmp_path / "dense.safetensors", tmp_path / "small.safetensors", [m.energy for m in conversion.matrices]


def test_energies_are_those_of_the_decomposition(files: tuple[Path, Path, list[float]]) -> None:
    dense, small = layers_of(read(files[0])), layers_of(read(files[1]))
    health = with_energies(matrix_health(small), small, dense)
    assert [entry.energy for entry in health] == pytest.approx(files[2], abs=1e-5)
    assert {entry.factors for entry in health} == {"4x4,4x4"}
    assert [entry.parameters for entry in health] == [32] * 3
    assert all(0 < (entry.energy_null or 0) < 0.5 for entry in health)
    assert all(entry.energy is None for entry in with_energies(matrix_health(dense), dense, dense))


def test_singular_values_are_sampled_from_the_first_to_the_last(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "wide.safetensors", nn.RNN(3, 100).state_dict())
    layers = layers_of(read(tmp_path / "wide.safetensors"))
    (entry,) = matrix_health(layers)
    values = torch.linalg.svdvals(layers.modules()[0].weight_hh_l0.double()).tolist()  # type: ignore[union-attr]
    assert len(entry.singular_values) == 64
    assert (entry.singular_values[0], entry.singular_values[-1]) == pytest.approx((values[0], values[-1]))
    assert list(entry.singular_values) == sorted(entry.singular_values, reverse=True)


def test_peak_memory_grows_with_the_batch(files: tuple[Path, Path, list[float]]) -> None:
    peaks = peak_memory(layers_of(read(files[0])), steps=8)
    assert peaks[1] >= 8 * 16 * 4  # at least the output
    assert peaks[32] > 8 * peaks[1]


def test_files_that_tell_less_are_measured_like_those_that_tell_more(tmp_path: Path) -> None:
    net = nn.RNN(4, 16, batch_first=True, nonlinearity="relu")
    write_safetensors(tmp_path / "told-nothing.safetensors", net.state_dict())
    save(convert(net, "4x4,4x4")[0], tmp_path / "told.safetensors")
    dense, small = (layers_of(read(tmp_path / f"{name}.safetensors")) for name in ("told-nothing", "told"))
    assert dense.items[0][0].batch_first is None
    filled = agreeing([dense, small])
    assert filled[1].items == small.items
    ((layer, matrices),) = filled[0].items
    assert layer.batch_first is True and layer.nonlinearity == "relu" and matrices == {}
    (module,) = filled[0].modules()
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(module(x), net(x))


def test_what_the_file_tells(files: tuple[Path, Path, list[float]], tmp_path: Path) -> None:
    small = read(files[1])
    assert history(small) == [{"epoch": 0, "loss": None, "metrics": {"m": 1.0}}]
    assert provenance(small)["seed"] == "7" and "fine-tuning" not in provenance(small)


def test_command_writes_html_and_markdown(
    files: tuple[Path, Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kruify.reporting.build.measure_latency", lambda layers, **_: measure_latency(layers, seconds=0.0)
    )
    page, card = tmp_path / "report.html", tmp_path / "card.md"
    arguments = ["report", *map(str, files[:2]), "--html", str(page), "--markdown", str(card), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["models"][1]["recurrent_matrices"][0]["factors"] == "4x4,4x4"
    assert page.read_text().startswith("<!doctype html>") and "# dense, compared with small" in card.read_text()
