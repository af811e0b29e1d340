"""Names of one tensor in a file: written once, counted once, one again when the file is read; or said to come apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import read, write_safetensors
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import locate
from kruify.conversion.plan import make_plan
from kruify.conversion.tensors import convert_tensors

APART = "a.weight_ih_l0 and b.weight_ih_l0 are one tensor and become two"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    layer, net = nn.GRU(8, 8), nn.Module()
    net.a, net.b, net.out, net.embedding = layer, layer, nn.Linear(8, 4), nn.Embedding(4, 8)
    net.out.weight = net.embedding.weight
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize(("dtype", "ending"), [("int8", "safetensors"), ("float16", "pt"), (None, "safetensors")])
def test_tied_tensors_are_written_and_counted_once(file: Path, dtype: str | None, ending: str) -> None:
    target = file.with_name(f"small.{ending}")
    done = kruify.convert(file, "4x2,2x4+sparse:4%", input_factors="4x2,2x4", output=target, dtype=dtype)
    assert not done.notes and done.bytes is not None
    found = read(target)
    assert {name.partition("_l0")[0] for name in found.ties} >= {"b.weight_ih", "b.weight_hh", "b.bias_hh"}
    assert kruify.inspect(target).parameters == done.parameters.total_after
    assert found.weight_bytes == done.bytes.after
    if ending == "safetensors":
        header = int.from_bytes(target.read_bytes()[:8], "little")
        assert target.stat().st_size == 8 + header + done.bytes.after
        kruify.verify(target)
    for name, tensor in found.tensors.items():
        assert tensor.equal(found.tensors[name.replace("b.", "a.", 1) if name.startswith("b.") else name])
    kruify.export(target, "dense", file.with_name("dense.pt"))
    assert read(file.with_name("dense.pt")).ties == read(file).ties


@pytest.mark.parametrize("options", [{"only": ["a"]}, {"overrides": {"b": "dense", "b.weight_ih*": "dense"}}])
def test_tied_layers_that_become_two_are_said_and_counted(file: Path, options: dict) -> None:
    target = file.with_name("small.safetensors")
    done = kruify.convert(file, "4x2,2x4", input_factors="4x2,2x4", output=target, **options)
    assert done.notes == [f"{APART} (and 1 more like them): convert them alike to keep one"]
    assert done.notes == kruify.convert(file, "4x2,2x4", input_factors="4x2,2x4", dry_run=True, **options).notes
    assert kruify.inspect(target).parameters == done.parameters.total_after
    kruify.export(target, "dense", file.with_name("dense.pt"))
    dense = read(file.with_name("dense.pt"))
    assert set(dense.ties) == {"b.bias_ih_l0", "b.bias_hh_l0", "embedding.weight"}


def test_of_three_names_those_that_become_the_same_stay_one() -> None:
    layer = nn.ModuleDict(dict.fromkeys("abc", nn.RNN(4, 8)))
    small, done = kruify.convert(layer, "4x2,2x4", overrides={"[bc]": "4x4,2x2"})
    assert small["b"].weight_hh_l0 is small["c"].weight_hh_l0
    assert done.parameters.total_after == sum(p.numel() for p in small.parameters())


def test_a_budget_of_bytes_counts_tied_tensors_once(file: Path) -> None:
    target = file.with_name("small.safetensors")
    done = kruify.convert(file, budget="size=3800B", output=target)
    assert done.bytes is not None and target.stat().st_size == done.bytes.file <= 3800


def test_a_whole_module_does_not_take_layers_that_came_apart(file: Path) -> None:
    net = nn.Sequential(nn.RNN(4, 8), nn.RNN(4, 8))
    net[1] = net[0]
    torch.save(net, file)
    small = file.with_name("small.pt")
    kruify.convert(file, "4x2,2x4", only=["0"], output=small)
    with pytest.raises(kruify.KruifyError, match="weight_hh_l0 are one tensor in a whole pickled module, and differ"):
        kruify.export(small, "dense", file.with_name("dense.pt"), original=file)


@pytest.mark.parametrize("second", [{"x": "y"}, {"w": "w"}, {"x": 1}, []])
def test_a_damaged_note_of_ties_is_refused(tmp_path: Path, second: object) -> None:
    notes = {"kruify.schema": "2", "kruify.plan": "{}", "kruify.ties": json.dumps(second)}
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}, notes)
    with pytest.raises(kruify.KruifyError, match="ties"):
        read(tmp_path / "a.safetensors")


def test_a_bias_beside_two_matrices_is_not_corrected_for_one() -> None:
    """Moments of a task move the bias beside a matrix; a bias that another matrix has, too, would be wrong there."""
    net = nn.ModuleDict({"a": nn.RNN(4, 8), "b": nn.RNN(4, 8)})
    moments = Moments(9, torch.ones(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    known = {f"{name}.weight_hh_l0": moments for name in "ab"}
    plan = make_plan(locate(net).layers, "4x2,2x4")

    def corrected() -> dict[str, bool]:
        done = convert_tensors(net.state_dict(), plan, locate(net), moments=known).tensors
        return {name: not tensor.equal(done[name]) for name, tensor in net.state_dict().items() if name in done}

    assert corrected() == {name: "bias_hh" in name for name in corrected()}
    net["b"].bias_hh_l0 = net["a"].bias_hh_l0
    assert not any(corrected().values())
    net["b"].weight_hh_l0 = net["a"].weight_hh_l0
    assert corrected() == {name: "bias_hh" in name for name in corrected()}
