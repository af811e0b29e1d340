"""`kruify convert`: counts, files, plans, patterns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import read

KEYS = {
    "name", "layer", "gate", "shape", "factors", "terms", "parameters_before", "parameters_after", "energy",
    "energy_null", "relative_error", "energy_weighted",
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "per_gate"),
    [
        ("2x2", 8 * 4),
        ("16x16", 2 * 256),
        ("4*(16x16,16x16)", 4 * 2 * 256),
        ("4*(16x16,16x16)+4*(256x1,1x256)", 4 * 2 * 256 + 4 * 2 * 256),
    ],
)
def test_parameter_counts_of_the_published_network(spec, per_gate, tmp_path, monkeypatch, run, run_json):
    monkeypatch.chdir(tmp_path)
    exported = run("tasks", "--export", "g2p-en", "-o", "g2p.pt")
    if "is not installed" in exported.stderr:
        pytest.skip(exported.stderr)
    result = run_json("convert", "g2p.pt", "--factors", spec)
    assert result["output"] == "g2p.kru.safetensors"
    assert set(result["matrices"][0]) == KEYS
    assert [m["gate"] for m in result["matrices"]] == ["r", "z", "n"] * 2
    assert all(m["parameters_after"] == per_gate and m["parameters_before"] == 65536 for m in result["matrices"])
    assert result["parameters"] == {
        "recurrent_before": 393_216,
        "recurrent_after": 6 * per_gate,
        "recurrent_ratio": 65536 / per_gate,
        "total_before": 834_890,
        "total_after": 834_890 - 393_216 + 6 * per_gate,
        "total_ratio": 834_890 / (834_890 - 393_216 + 6 * per_gate),
    }
    written = read("g2p.kru.safetensors")  # the file holds what was announced
    counted = sum(t.numel for n, t in written.tensors.lazy.items() if ".weight_hh_l0." in n)
    assert counted == result["parameters"]["recurrent_after"]


def test_misfit_names_specs_that_fit_and_writes_nothing(folder, run):
    before = sorted(folder.iterdir())
    result = run("convert", "model.pt", "--factors", "3x3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "rnn.weight_hh_l0 gate r (8x8)" in result.stderr
    fitting = re.findall(r"'([0-9x,]+)'", result.stderr)
    assert fitting
    for spec in fitting:
        assert run("convert", "model.pt", "--factors", spec, "--dry-run").exit_code == 0
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(folder.iterdir()) == before


def test_converted_file_says_where_it_comes_from(folder, run_json):
    source = read("model.pt")
    result = run_json("convert", "model.pt", "--factors", "2x2", "-o", "small.kru.safetensors", "--seed", "7")
    metadata = read("small.kru.safetensors").metadata
    assert result["output"] == "small.kru.safetensors"
    assert metadata["kruify.source_sha256"] == source.sha256
    assert metadata["kruify.seed"] == "7"
    assert json.loads(metadata["kruify.plan"])["layers"][0]["name"] == "rnn"


def test_same_seed_same_bytes(folder, run_json):
    for name in ("a.kru.safetensors", "b.kru.safetensors"):
        run_json("convert", "model.pt", "--factors", "2*(4x4,2x2)", "-o", name)
    assert Path("a.kru.safetensors").read_bytes() == Path("b.kru.safetensors").read_bytes()


def test_all_terms_give_back_the_dense_function(folder, run_json):
    run_json("convert", "model.pt", "--factors", "4*(4x4,2x2)", "-o", "same.kru.safetensors")
    module = nn.Module()
    module.rnn, module.out = nn.GRU(3, 8), nn.Linear(8, 2)
    dense = nn.GRU(3, 8)
    dense.load_state_dict({n[4:]: t for n, t in torch.load("model.pt").items() if n.startswith("rnn.")})
    converted = kruify.load("same.kru.safetensors", into=module)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(converted.rnn(x)[0], dense(x)[0])


@pytest.mark.parametrize("ending", [".safetensors", "", ".pt", ".pth.tar", ".PKL", ".th", ".model", ".weights", ".bin"])
def test_output_kind_follows_its_ending(ending, folder, run, run_json):
    run_json("convert", "model.pt", "--factors", "2x2", "-o", f"out{ending}")
    result = run_json("inspect", f"out{ending}")
    assert result["format"] == ("safetensors" if ending in (".safetensors", "") else "torch")
    assert result["layers"][0]["recurrent_parameters"] == 3 * 3 * 4


@pytest.mark.parametrize("ending", [".onnx", ".h5", ".hdf5", ".keras", ".npz", ".ts", ".pt2", ".json", ".py"])
def test_endings_of_other_kinds_are_refused(ending, folder, run):
    result = run("convert", "model.pt", "--factors", "2x2", "-o", f"out{ending}")
    assert result.exit_code == 2 and "another kind of file" in result.stderr
    assert not (folder / f"out{ending}").exists()


def test_any_header_length_is_read_as_safetensors(folder, run_json):
    """The length of a header may begin with the byte that a pickle begins with (0x80)."""
    from kruify.checkpoint import write_safetensors

    for padding in range(0, 256, 8):
        write_safetensors("x.safetensors", torch.load("model.pt"), {"note": "." * padding})
        assert len(run_json("inspect", "x.safetensors")["layers"]) == 1
        if Path("x.safetensors").read_bytes()[0] == 0x80:
            return
    pytest.fail("no padding gave the first byte 0x80")


def test_dry_run_writes_nothing_and_counts_the_same(folder, run, run_json):
    before = sorted(folder.iterdir())
    dry = run_json("convert", "model.pt", "--factors", "2x2+diag", "--input-factors", "auto", "--dry-run")
    assert sorted(folder.iterdir()) == before
    real = run_json("convert", "model.pt", "--factors", "2x2+diag", "--input-factors", "auto")
    assert dry["output"] is None
    assert dry["parameters"] == real["parameters"]
    assert [m["parameters_after"] for m in dry["matrices"]] == [m["parameters_after"] for m in real["matrices"]]
    assert dry["matrices"][0]["energy"] is None


def test_plan_out_edited_and_given_back(folder, run_json):
    run_json("convert", "model.pt", "--factors", "2x2", "--dry-run", "--plan-out", "plan.json")
    plan = json.loads(Path("plan.json").read_text())
    plan["layers"][0]["matrices"]["weight_hh_l0"]["gates"]["n"] = "4x4,2x2"
    Path("plan.json").write_text(json.dumps(plan))
    result = run_json("convert", "model.pt", "--plan", "plan.json")
    assert [m["parameters_after"] for m in result["matrices"]] == [12, 12, 20]


def test_patterns(folder, run, run_json):
    result = run_json("convert", "model.pt", "--factors", "2x2", "--set", "*.weight_hh_l0.z=4x4,2x2", "--dry-run")
    assert [m["factors"] for m in result["matrices"]] == ["2x2,2x2,2x2", "4x4,2x2", "2x2,2x2,2x2"]
    for option in ("--only", "--skip"):
        wrong = run("convert", "model.pt", "--factors", "2x2", option, "decoder*")
        assert wrong.exit_code == 2
        assert "decoder*" in wrong.stderr
    nothing = run("convert", "model.pt", "--factors", "2x2", "--skip", "rnn")
    assert nothing.exit_code == 2
    assert "nothing is left to convert" in nothing.stderr


def test_calibrated_by_a_task(folder, run, run_json):
    plain = run_json("convert", "model.pt", "--factors", "4x4,2x2", "-o", "plain.kru.safetensors")
    fitted = run_json(
        "convert", "model.pt", "--factors", "4x4,2x2", "--task", "task.py:Echo", "-o", "fit.kru.safetensors"
    )
    assert all(m["energy_weighted"] is None for m in plain["matrices"])
    assert all(f["energy"] <= p["energy"] + 1e-9 for f, p in zip(fitted["matrices"], plain["matrices"], strict=True))
    assert all(0 < m["energy_weighted"] <= 1 for m in fitted["matrices"])
    assert "of W h" in run("convert", "model.pt", "--factors", "2x2", "--task", "task.py:Echo").stdout


def test_four_bits_without_a_task_are_told_of_one(folder, run):
    four_bits = ("convert", "model.pt", "--factors", "dense", "--dtype", "int4")
    assert "--task TASK makes less of an error" in run(*four_bits).stdout
    known = run(*four_bits, "--task", "task.py:Echo")
    assert known.exit_code == 0 and "makes less of an error" not in known.stdout


def test_converting_twice_is_refused(folder, run):
    assert run("convert", "model.pt", "--factors", "2x2").exit_code == 0
    result = run("convert", "model.kru.safetensors", "--factors", "2x2")
    assert result.exit_code == 2
    assert "converted already" in result.stderr


def test_table_warns_that_conversion_alone_is_not_enough(folder, run):
    result = run("convert", "model.pt", "--factors", "2x2")
    assert "destroys accuracy" in result.stdout
    assert "energy" in result.stdout and "kept" in result.stdout
    assert "null" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--factors", "2x2", "--set", "rnn"],
        ["--plan", "p.json", "--factors", "2x2"],
        [],
        ["--factors", "banana"],
        ["--plan", "missing.json"],
        ["--factors", "2x2", "-o", "missing/out.safetensors"],
    ],
)
def test_usage_errors(arguments, folder, run):
    before = sorted(folder.rglob("*"))
    result = run("convert", "model.pt", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("spec", "said"), [("2x2", True), ("auto", True), ("2*(4x2,2x4)", False), ("4x4,2x2+diag", False)]
)
def test_what_to_expect_of_one_product_is_said(folder, run, spec, said):
    assert ("One product stands for each gate" in run("convert", "model.pt", "--factors", spec).stdout) is said


def test_structures_stand_below_a_table_that_would_be_too_wide(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({f"encoder.{name}": tensor for name, tensor in nn.LSTM(16, 16, 2).state_dict().items()}, "deep.pt")
    spec = "3*(4x4,4x4)+2*(16x1,1x16)"
    command = ("convert", "deep.pt", "--factors", "4x4,4x4", "--set", f"*.weight_hh_l?.f={spec}", "--dry-run")
    for columns, rows, below in (("80", 0, 1), ("140", 2, 0)):
        monkeypatch.setenv("COLUMNS", columns)
        lines = run(*command).stdout.splitlines()
        assert sum("encoder.weight_hh_l" in line for line in lines) == 8  # no name is cut in two
        assert sum(spec in line and line.startswith("│") for line in lines) == rows
        assert lines.count(f"#2: 16x16 as {spec}, 256 -> 160 parameters") == below


def test_long_names_stand_below_the_table(tmp_path, run):
    layers = [f"decoder.If_1.{branch}.model.decoder.rnn.LSTM" for branch in ("then_branch", "else_branch")]
    state = {f"{layer}.{name}": tensor for layer in layers for name, tensor in nn.LSTM(8, 16).state_dict().items()}
    torch.save(state, tmp_path / "long.pt")
    for factors, gate in (("stacked:2*(64x1,1x16)", False), ("2*(16x1,1x16)", True)):
        lines = run("convert", str(tmp_path / "long.pt"), "--factors", factors, "--dry-run").stdout.splitlines()
        assert {f"1: {layers[0]}", f"2: {layers[1]}"} < set(lines)
        assert any("2: weight_hh_l0" in line for line in lines)
        assert any("gate" in line for line in lines) is gate  # not where all rows have "all"
