"""`kruify compress`: one command, one file; exit code 6 where `--max-drop` is not reached."""

from __future__ import annotations

import json

from kruify.analysis.latency import measure_latency
from kruify.checkpoint import read


def test_within_max_drop(folder, run_json):
    result = run_json(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0.5", "--max-drop", "10",
        "-o", "small.kru.safetensors",
    )  # fmt: skip
    assert result["within"] is True
    assert result["attempts"][0]["recurrent_ratio"] >= 2
    assert [set(candidate) for candidate in result["trials"]] == [{"factors", "metrics", "lr", "dtype"}] * 3
    (slack,) = result["budget"]
    assert slack["allowed"] == 192 // 2 and slack["used"] == result["attempts"][0]["recurrent_after"]
    file = read("small.kru.safetensors")
    assert file.is_kruify and json.loads(file.metadata["kruify.history"]) == result["history"]
    assert [entry["epoch"] for entry in result["history"]] == [0, 1]


def test_out_of_reach(folder, run):
    result = run(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0", "--max-drop", "0",
        "--attempts", "1", "--trial", "0", "-o", "small.kru.safetensors",
    )  # fmt: skip
    assert result.exit_code == 6
    assert "the only attempt loses" in result.stderr
    assert read("small.kru.safetensors").is_kruify  # the nearest network is kept all the same


def test_resumed_with_options_of_the_recipe(folder, run, run_json):
    command = (
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0.5", "--resume", "state",
        "--option", "warmup=0.1", "-o", "small.kru.safetensors",
    )  # fmt: skip
    first = run_json(*command)
    assert run_json(*command) == first  # nothing is trained again
    other = run(*command, "--option", "clip=0.5")
    assert other.exit_code == 2 and "other recipe" in other.stderr
    twice = run(*command, "--option", "epochs=3")
    assert twice.exit_code == 2 and "a second time" in twice.stderr


def test_a_layer_that_is_skipped_and_one_that_is_set(folder, run, run_json):
    result = run_json(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0.5", "--trial", "0",
        "--set", "*weight_hh_l0=2*(8x1,1x8)", "--skip", "out", "--input-factors", "1*(8x1,1x3)", "--max-drop", "500%",
        "--log-dir", "logs", "-o", "small.kru.safetensors",
    )  # fmt: skip
    specs = json.loads(read("small.kru.safetensors").metadata["kruify.plan"])["layers"][0]["matrices"]
    assert specs == {"weight_hh_l0": "2*(8x1,1x8)", "weight_ih_l0": "8x1,1x3"}
    assert result["allowed_drop"] == 5 * result["baseline"]["loss"]
    assert (folder / "logs" / "attempt-1" / "history.csv").is_file()
    refused = run("compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--skip", "rnn", "-o", "x.pt")
    assert refused.exit_code == 2


def test_the_card_of_what_was_compressed(folder, run, monkeypatch):
    monkeypatch.setattr(
        "kruify.reporting.build.measure_latency", lambda layers, **_: measure_latency(layers, seconds=0.0)
    )
    result = run(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0.5", "--card", "card.md",
        "-o", "small.kru.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    card = (folder / "card.md").read_text()
    assert card.startswith("---\nlibrary_name: ") and "## Training of small" in card
    assert result.stderr.count("candidate ") == 3 and "candidate" not in result.stdout  # told once each


def test_a_size_is_of_the_file_and_in_int8(folder, run, run_json):
    command = (
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "size=2900", "--epochs", "0.5", "--trial", "0",
        "-o", "small.kru.safetensors",
    )  # fmt: skip
    result = run_json(*command)
    told = run(*command)
    written = (folder / "small.kru.safetensors").stat().st_size
    assert result["bytes"]["after"] == written <= 2900
    assert result["bytes"]["ratio"] == result["bytes"]["before"] / written
    assert set(read("small.kru.safetensors").storage.values()) == {"int8", "float16", "sum+n"}  # biases
    assert result["attempts"][0]["bytes"] == written
    first, second, *_ = [line for line in told.stdout.splitlines() if line != "building the model"]  # the task prints
    size = f"{written:,} bytes, {result['bytes']['ratio']:.1f}x smaller"
    assert first.split() == ["whole", "file", f"{result['bytes']['before']:,}", "->", *size.split()]
    assert second == f"the budget allows 2,900 bytes, {2900 - written} are left"
    (row,) = [line for line in told.stdout.splitlines() if "1 *" in line]
    assert f"{written:,}" in row and "bytes of the file" in told.stdout and "recurrent" not in told.stdout
    assert f"{result['bytes']['ratio']:.1f}x smaller: loss" in told.stderr
