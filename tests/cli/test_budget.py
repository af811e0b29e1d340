"""`kruify convert --budget`: the budget is kept, both costs, and what cannot be kept is said."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn


@pytest.fixture
def model(folder):
    path = folder / "net.pt"
    torch.save(nn.ModuleDict({"a": nn.LSTM(12, 16, 2), "b": nn.GRU(16, 16)}).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(("budget", "share"), [("10x", 0.1), ("params=25%", 0.25)])
def test_parameters_within_the_budget(model, run_json, budget, share):
    result = run_json("convert", model, "--budget", budget)
    parameters = result["parameters"]
    assert parameters["recurrent_before"] == 2 * 4 * 16 * 16 + 3 * 16 * 16
    assert 0.5 * share < parameters["recurrent_after"] / parameters["recurrent_before"] <= share
    again = run_json("convert", model, "--budget", budget)
    assert again == result


def test_multiply_adds_and_input_matrices(model, folder, run_json):
    plan = folder / "plan.json"
    result = run_json(
        "convert", model, "--budget", "macs=20%", "--input-budget", "4x", "--plan-out", str(plan), "--dry-run"
    )
    assert any("weight_ih" in m["name"] for m in result["matrices"])
    saved = json.loads(plan.read_text())
    assert saved["layers"][0]["matrices"]["weight_ih_l1"]["gates"].keys() == set("ifgo")
    executed = run_json("convert", model, "--plan", str(plan))
    assert executed["parameters"] == result["parameters"]
    before = sum(m["parameters_before"] for m in result["matrices"] if "weight_ih" in m["name"])
    assert sum(m["parameters_after"] for m in result["matrices"] if "weight_ih" in m["name"]) <= before / 4


def test_error_bound_alone(model, run_json):
    result = run_json("convert", model, "--max-error", "0.5", "--only", "b")
    assert {m["layer"] for m in result["matrices"]} == {"b"}
    assert all(m["relative_error"] <= 0.5 + 1e-6 for m in result["matrices"])


def test_overrides_are_set_on_top(model, run_json):
    result = run_json("convert", model, "--budget", "10x", "--set", "b=auto")
    assert {m["factors"] for m in result["matrices"] if m["layer"] == "b"} == {"4x4,4x4"}


def test_weighted_by_a_task(folder, run_json):
    result = run_json("convert", "model.pt", "--budget", "params=50%", "--task", "task.py:Echo")
    assert all(m["energy_weighted"] is not None for m in result["matrices"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "ten"), "'ten' is not a budget"),
        (("--budget", "0.5x"), "not a reduction"),
        (("--budget", "100000x"), "smallest structures"),
        (("--budget", "4x", "--factors", "2x2"), "not both"),
        (("--input-budget", "4x"), "goes with a budget"),
        (("--budget", "4x", "--plan", "p.json"), "a plan names all factors"),
    ],
)
def test_refused(model, run, folder, options, words):
    before = sorted(folder.iterdir())
    result = run("convert", model, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert sorted(folder.iterdir()) == before


def test_bytes_of_the_whole_file(model, folder, run, run_json):
    before = sum(4 * tensor.numel() for tensor in torch.load(model).values())
    command = ("convert", model, "--budget", "size=3.6x", "-o", "small.safetensors")
    dry = run_json(*command, "--dry-run")
    result = run_json(*command)
    size = result["bytes"]
    assert dry["bytes"] == size
    assert (size["before"], size["allowed"]) == (before, int(before / 3.6))
    assert size["file"] == (folder / "small.safetensors").stat().st_size <= size["allowed"]
    assert any("weight_ih" in m["name"] for m in result["matrices"])
    line = f"{before:,} -> {size['file']:,} bytes".replace(" ", "")
    assert line in run(*command, "--dry-run").stdout.replace(" ", "")
    assert "the smallest file" in run("convert", model, "--budget", "size=2kB").stderr
