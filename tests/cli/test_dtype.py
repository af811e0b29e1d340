"""`--dtype` and `--keep`: what the files hold, what is said of their bytes, what later commands do with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import kruify
from kruify.checkpoint import read

INT8 = ("--dtype", "int8")


def held(path: str) -> dict[str, torch.dtype]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


def data_bytes(path: str) -> int:
    """Bytes after the header of a safetensors file."""
    data = Path(path).read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_dense_in_eight_bits(folder, run, run_json):
    result = run_json("convert", "model.pt", "--factors", "dense", *INT8, "-o", "a.safetensors")
    assert result["matrices"] == [] and result["parameters"]["total_ratio"] == 1
    dtypes = held("a.safetensors")
    assert {n for n, d in dtypes.items() if d == torch.int8} == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"}
    assert result["bytes"]["after"] == data_bytes("a.safetensors")
    assert result["bytes"]["before"] == sum(4 * tensor.numel() for tensor in torch.load("model.pt").values())
    assert run("verify", "a.safetensors").exit_code == 0
    again = run_json("inspect", "a.safetensors")
    assert [layer["name"] for layer in again["layers"]] == ["rnn"] and again["layers"][0]["recurrent_parameters"] == 192
    dry = run_json("convert", "model.pt", "--factors", "dense", *INT8, "--dry-run")
    assert dry["bytes"] == result["bytes"]


def test_printed_bytes(folder, run):
    torch.save({"state_dict": torch.load("model.pt"), "optimizer_states": [{"m": torch.zeros(5000)}]}, "full.ckpt")
    result = run("convert", "full.ckpt", "--factors", "2*(8x1,1x8)+sparse:5%:1", *INT8, "--dry-run")
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("weights in the file"))
    beside = Path("full.ckpt").stat().st_size - 4 * sum(t.numel() for t in torch.load("model.pt").values())
    assert "1,320 ->" in line and f"full.ckpt holds {beside:,} bytes beside its weights" in result.stdout


@pytest.mark.parametrize("spec", ["2*(4x4,2x2)+diag", "stacked:2*(24x1,1x8)+sparse:5%:8", "auto+sparse:5%:1"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_stated_bytes_are_those_of_the_file(spec, dtype, folder, run_json):
    options = ("--factors", spec, "--input-factors", "8x1,1x3", "--dtype", dtype)
    result = run_json("convert", "model.pt", *options, "-o", "a.safetensors")
    assert result["bytes"]["after"] == data_bytes("a.safetensors") == read("a.safetensors").weight_bytes
    kruify.verify("a.safetensors", "model.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_float32(dtype, folder, run_json):
    torch.save({n: t.to(dtype) for n, t in torch.load("model.pt").items()}, "other.pt")
    run_json("convert", "other.pt", "--factors", "auto", *INT8, "-o", "a.safetensors")
    assert {t.dtype for t in read("a.safetensors").tensors.values()} == {torch.float32}
    assert next(kruify.load("a.safetensors")["rnn"].parameters()).dtype == torch.float32
    run_json("convert", "other.pt", "--factors", "auto", "--dtype", "float32", "-o", "b.safetensors")
    assert set(held("b.safetensors").values()) == {torch.float32}


def test_keep(folder, run, run_json):
    run_json("convert", "model.pt", "--factors", "auto", *INT8, "--keep", "out", "-o", "a.safetensors")
    assert held("a.safetensors")["out.weight"] == torch.float32
    assert "matches no weight" in run("convert", "model.pt", "--factors", "auto", *INT8, "--keep", "x").stderr
    alone = run("convert", "model.pt", "--factors", "auto", "--keep", "out")
    assert alone.exit_code == 2 and "--dtype" in alone.stderr


def test_module_and_file_agree(folder):
    net = nn.ModuleDict({"rnn": nn.GRU(3, 8), "out": nn.Linear(8, 2)})
    net.load_state_dict(torch.load("model.pt"))
    small, said = kruify.convert(net, "2*(4x4,2x2)", dtype="int8", keep=["out"])
    from_file = kruify.convert("model.pt", "2*(4x4,2x2)", dtype="int8", keep=["out"], output="a.safetensors")
    state = small.state_dict()
    assert said.storage == from_file.storage and said.bytes.after == from_file.bytes.after
    for name, tensor in read("a.safetensors").tensors.items():
        assert torch.equal(tensor, state[name]) and torch.equal(from_file.tensors[name].load(), tensor), name


@pytest.mark.parametrize("spec", ["2*(4x4,2x2)", "dense", "stacked:2*(24x1,1x8)+sparse:5%:8"])
def test_finetuning_keeps_the_dtype_of_the_file(spec, folder, run_json):
    run_json("convert", "model.pt", "--factors", spec, *INT8, "-o", "a.safetensors")
    train = ("--task", "task.py:Echo", "--epochs", "1")
    result = run_json("finetune", "a.safetensors", *train, "-o", "b.safetensors")
    assert held("b.safetensors") == held("a.safetensors") and read("b.safetensors").storage
    told = run_json("evaluate", "b.safetensors", "--task", "task.py:Echo", "--split", "valid")["metrics"]["loss"]
    assert told == pytest.approx(result["metrics"]["loss"], rel=1e-5)  # of the rounded weights
    run_json("finetune", "b.safetensors", *train, "--dtype", "float32", "-o", "c.safetensors")
    assert not read("c.safetensors").storage and torch.int8 not in held("c.safetensors").values()


def test_finetuning_a_dense_file_to_int8(folder, run_json):
    run_json("finetune", "model.pt", "--task", "task.py:Echo", "--epochs", "1", *INT8, "-o", "b.safetensors")
    assert held("b.safetensors")["rnn.weight_hh_l0"] == torch.int8
    kruify.verify("b.safetensors")


def test_compress_and_sweep(folder, run, run_json):
    common = ("model.pt", "--task", "task.py:Echo", "--epochs", "0.5", "--trial", "0", *INT8)
    run_json("compress", *common, "--budget", "2x", "--resume", "state", "-o", "a.safetensors")
    assert held("a.safetensors")["out.weight"] == torch.int8
    other = run("compress", *common[:-2], "--budget", "2x", "--resume", "state", "-o", "b.safetensors")
    assert other.exit_code == 2  # the state is of another dtype
    done = run_json("sweep", *common, "--budgets", "2x", "--keep", "out")
    file = done["points"][1]["file"]
    assert held(file)["rnn.weight_ih_l0"] == torch.int8 and held(file)["out.weight"] == torch.float32
    kruify.verify(file)


@pytest.mark.parametrize("spec", ["2*(4x4,2x2)+diag", "dense", "stacked:2*(24x1,1x8)+sparse:5%:8"])
def test_export_computes_with_the_rounded_weights(spec, folder, run_json):
    run_json("convert", "model.pt", "--factors", spec, *INT8, "-o", "a.safetensors")
    run_json("export", "a.safetensors", "--to", "dense", "-o", "dense.pt")
    dense, small = torch.load("dense.pt"), kruify.load("a.safetensors")["rnn"]
    plain = nn.GRU(3, 8)
    plain.load_state_dict({n: dense[f"rnn.{n}"] for n in plain.state_dict()})
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(plain(x)[0], small(x)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(dense["out.weight"], read("a.safetensors").tensors["out.weight"])
    for to, name in (("onnx", "a.onnx"), ("torch", "a.pt2")):
        assert run_json("export", "a.safetensors", "--to", to, "-o", name)["outputs"][0]["difference"] < 1e-4


def test_report_compares_weights_with_weights(folder, run_json):
    torch.save({"state_dict": torch.load("model.pt"), "optimizer_states": [{"m": torch.zeros(5000)}]}, "full.ckpt")
    run_json("convert", "full.ckpt", "--factors", "dense", *INT8, "-o", "a.safetensors")
    result = run_json("report", "full.ckpt", "a.safetensors")
    first, small, _ = result["models"]
    assert first["weight_bytes"] == 1320 and first["bytes"] == Path("full.ckpt").stat().st_size
    assert small["weight_bytes"] == data_bytes("a.safetensors")
    assert small["bytes"] == Path("a.safetensors").stat().st_size
    assert result["ratios"][0]["bytes"] == 1320 / small["weight_bytes"]
    assert json.dumps(result)
