"""`kruify compress`: one command, one file; exit code 6 where `--max-drop` is not reached."""

from __future__ import annotations

from kruify.checkpoint import read


def test_within_max_drop(folder, run_json):
    result = run_json(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0.5", "--max-drop", "10",
        "-o", "small.kru.safetensors",
    )  # fmt: skip
    assert result["within"] is True
    assert result["attempts"][0]["recurrent_ratio"] >= 2
    assert [set(candidate) for candidate in result["trials"]] == [{"factors", "metrics"}] * 2
    assert read("small.kru.safetensors").is_kruify


def test_out_of_reach(folder, run):
    result = run(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "--epochs", "0", "--max-drop", "-100",
        "--attempts", "1", "--trial", "0", "-o", "small.kru.safetensors",
    )  # fmt: skip
    assert result.exit_code == 6
    assert "the nearest of 1 attempts loses" in result.stderr
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


def test_a_size_is_of_the_file_and_in_int8(folder, run_json):
    result = run_json(
        "compress", "model.pt", "--task", "task.py:Echo", "--budget", "size=2900", "--epochs", "0.5", "--trial", "0",
        "-o", "small.kru.safetensors",
    )  # fmt: skip
    written = (folder / "small.kru.safetensors").stat().st_size
    assert result["bytes"]["after"] == written <= 2900
    assert result["bytes"]["ratio"] == result["bytes"]["before"] / written
    assert set(read("small.kru.safetensors").storage.values()) == {"int8"}
