"""inspect, evaluate, finetune, report, tasks: what they print and write."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from kruify.checkpoint import read


def test_inspect(folder, run, run_json):
    state = nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3).state_dict()
    torch.save({**{f"net.{n}": t for n, t in state.items()}, "bad.weight_hh_l0": torch.zeros(7, 6)}, "x.pt")
    result = run_json("inspect", "x.pt")
    (layer,) = result["layers"]
    wanted = {
        "name": "net", "kind": "lstm", "input_size": 5, "hidden_size": 6, "num_layers": 2, "bidirectional": True,
        "bias": True, "proj_size": 3, "recurrent_parameters": 4 * 24 * 3, "input_parameters": 2 * 24 * (5 + 6),
    }  # fmt: skip
    assert {key: layer[key] for key in wanted} == wanted
    assert result["skipped"] == [{"name": "bad", "reason": "weight_hh_l0 has no weight_ih_l0 beside it"}]
    assert result["parameters"] == sum(t.numel() for t in state.values()) + 42
    assert result["format"] == "torch"
    text = run("inspect", "x.pt").stdout
    assert "2 layers, bidirectional, projected to 3" in text
    assert "passed over bad" in text


class Gated(nn.LSTM):
    pass


def test_inspect_knows_what_a_whole_module_says(folder, run_json):
    net = nn.ModuleDict({"relu": nn.RNN(3, 8, nonlinearity="relu", batch_first=True), "own": Gated(3, 8)})
    torch.save(net, "whole.pt")
    result = run_json("inspect", "whole.pt")
    (layer,) = result["layers"]
    assert (layer["name"], layer["nonlinearity"], layer["batch_first"]) == ("relu", "relu", True)
    ((name, reason),) = [(s["name"], s["reason"]) for s in result["skipped"]]
    assert name == "own"
    assert "Gated" in reason
    plan = run_json("convert", "whole.pt", "--factors", "2x2")
    assert {m["layer"] for m in plan["matrices"]} == {"relu"}


def test_inspect_shows_the_factors_of_a_converted_file(folder, run, run_json):
    run("convert", "model.pt", "--factors", "2x2")
    (layer,) = run_json("inspect", "model.kru.safetensors")["layers"]
    assert layer["factors"] == {"weight_hh_l0": {gate: "2x2,2x2,2x2" for gate in "rzn"}}
    assert layer["recurrent_parameters"] == 36
    assert layer["input_parameters"] == 3 * 8 * 3
    assert "r = 2x2,2x2,2x2" in run("inspect", "model.kru.safetensors").stdout


def test_evaluate_keeps_stdout_for_the_result(folder, run, run_json):
    result = run_json("evaluate", "model.pt", "--task", "task.py:Echo", "--split", "valid")
    assert set(result) == {"schema", "metrics", "split", "examples"}
    assert set(result["metrics"]) == {"loss"}
    assert (result["split"], result["examples"]) == ("valid", 12)
    assert "building the model" in run("evaluate", "model.pt", "--task", "task.py:Echo", "--json").stderr


def test_convert_finetune_report(folder, run, run_json):
    run("convert", "model.pt", "--factors", "4x4,2x2")
    before = run_json("evaluate", "model.kru.safetensors", "--task", "task.py:Echo", "--split", "valid")["metrics"]
    tuned = run_json(
        "finetune", "model.kru.safetensors", "--task", "task.py:Echo", "-o", "tuned.kru.safetensors", "--epochs", "4",
        "--teacher", "model.pt", "--option", "schedule=constant", "--log-dir", "logs", "--seed", "3", "--device", "cpu",
    )  # fmt: skip
    assert tuned["output"] == "tuned.kru.safetensors"
    assert {"epoch", "step", "loss", "penalty", "metrics"} <= set(tuned["history"][-1])
    assert tuned["history"][-1]["step"] == 12
    assert tuned["metrics"]["loss"] < before["loss"]
    assert (folder / "logs" / "history.csv").is_file()
    again = run_json("evaluate", "tuned.kru.safetensors", "--task", "task.py:Echo", "--split", "valid")["metrics"]
    assert again["loss"] == pytest.approx(tuned["metrics"]["loss"], rel=1e-5)

    metadata = read("tuned.kru.safetensors").metadata
    dense, converted = read("model.pt").sha256, read("model.kru.safetensors").sha256
    assert metadata["kruify.source_sha256"] == dense
    assert json.loads(metadata["kruify.parents"]) == [dense, converted]
    assert metadata["kruify.seed"] == "3"
    assert metadata["kruify.origin"] == read("model.kru.safetensors").metadata["kruify.origin"] != ""

    files = ("model.pt", "model.kru.safetensors", "tuned.kru.safetensors")
    report = run_json("report", *files, "--task", "task.py:Echo")
    first, second, third, int8 = report["models"]
    assert [m["name"] for m in report["models"]] == [
        "model.pt",
        "model.kru.safetensors",
        "tuned.kru.safetensors",
        "model.pt (int8)",
    ]
    assert first["parameters"] == {"recurrent": 192, "input": 72, "other": 66, "total": 330}
    assert second["parameters"]["recurrent"] == 3 * 20
    assert first["multiply_adds_per_step"] == 192 + 72
    assert second["multiply_adds_per_step"] == 72 + 3 * (8 * 4 + 8 * 2)
    assert int8["metrics"] != first["metrics"]
    assert set(first["latency_ms"]) == set(int8["latency_ms"]) == {"1", "32"}
    assert third["sources"] == [dense, converted]
    assert [m["bytes"] for m in report["models"][:3]] == [(folder / name).stat().st_size for name in files]
    assert set(first["recurrent_matrices"][0]) >= {
        "name", "gate", "condition_number", "spectral_norm", "unitarity_defect",
    }  # fmt: skip
    assert report["ratios"][0]["recurrent_parameters"] == 192 / 60
    change = third["metrics"]["loss"] - first["metrics"]["loss"]
    assert report["ratios"][1]["metrics_change"]["loss"] == change
    text = run("report", *files).stdout
    assert "3.2x smaller" in text
    assert "one thread" in text


def test_finetune_of_a_dense_checkpoint_stays_dense(folder, run_json):
    run_json("finetune", "model.pt", "--task", "task.py:Echo", "-o", "dense.safetensors", "--epochs", "1")
    checkpoint = read("dense.safetensors")
    assert not checkpoint.is_kruify
    assert set(checkpoint.tensors) == set(read("model.pt").tensors)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "-1"], "epochs must be 0 or more"),
        (["--option", "epcohs=3"], "Did you mean epochs"),
        (["--option", "patience=some"], "--option patience=some"),
        (["--option", "seed=3"], "Use --seed alone"),
        (["--lr", "0.1", "--option", "lr=0.2"], "--option lr=0.2 sets lr a second time. Use --lr alone"),
        (["--option", "patience=1", "--option", "patience=2"], "Give it once"),
        (["--device", "cuda:77"], "there is no device"),
        (["--teacher", "missing.pt"], "there is no such file"),
    ],
)
def test_finetune_refuses_before_it_trains(arguments, sentence, folder, run):
    result = run("finetune", "model.pt", "--task", "task.py:Echo", "-o", "out.safetensors", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (folder / "out.safetensors").exists()


def test_a_training_that_gains_nothing_says_so(folder, run):
    command = ("finetune", "model.pt", "--task", "task.py:Echo", "--epochs", "0.5", "-o", "tuned.pt", "--lr")
    still = run(*command, "10")
    assert still.exit_code == 0, still.stderr
    assert "Nothing was gained: no epoch validates better" in still.stdout
    assert "training loss" in still.stdout and "loss, valid" in still.stdout  # the metric of this task is a loss, too
    assert "Nothing was gained" not in run(*command, "0.01").stdout


def test_tasks_lists_what_there_is(run, run_json):
    names = [task["name"] for task in run_json("tasks")["tasks"]]
    assert "g2p-en" in names
    assert "g2p-en" in run("tasks").stdout


def test_tasks_export_needs_a_file_and_a_known_ending(folder, run):
    assert run("tasks", "--export", "g2p-en").exit_code == 2
    result = run("tasks", "--export", "g2p-en", "-o", "g2p.onnx")
    assert result.exit_code == 2
    assert ".safetensors" in result.stderr
    assert not (folder / "g2p.onnx").exists()
