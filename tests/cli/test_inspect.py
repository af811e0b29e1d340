"""`kruify inspect`: what the file is beside its layers, and what runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kruify


def test_wrapper_ties_and_broken_numbers(tmp_path, run, run_json):
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    net["a"].bias.data[1] = float("nan")
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    path = tmp_path / "wrapped.pt"
    torch.save({"state_dict": state, "optimizer": {"state": {}}}, path)
    result = run_json("inspect", str(path))
    assert (result["key"], result["prefix"]) == ("state_dict", "module.")
    assert result["ties"] == {"b.weight": "a.weight"}
    assert result["nonfinite"] == {"a.bias": 1}
    assert result["bytes"] == path.stat().st_size
    text = run("inspect", str(path)).stdout
    for words in (
        "stands under state_dict",
        "begin with module.",
        "b.weight is tied to a.weight",
        "1 entry that is NaN",
    ):
        assert words in text


def test_layers_that_share_their_weights_are_named_once(tmp_path, run):
    rnn = nn.GRU(3, 4)
    torch.save(nn.ModuleDict({"a": rnn, "b": rnn}).state_dict(), tmp_path / "shared.pt")
    lines = run("inspect", str(tmp_path / "shared.pt")).stdout.splitlines()
    at = lines.index("tied are weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0 of")
    assert lines[at + 1 :] == ["  b to those of", "  a"]


def test_code_that_is_named_is_said_and_not_run(tmp_path, run, run_json):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

    Mine.__module__, Mine.__qualname__ = "elsewhere", "Mine"
    import sys
    import types

    sys.modules["elsewhere"] = module = types.ModuleType("elsewhere")
    module.Mine = Mine
    try:
        torch.save(Mine(), tmp_path / "whole.pt")
    finally:
        del sys.modules["elsewhere"]
    result = run_json("inspect", str(tmp_path / "whole.pt"))
    assert "elsewhere.Mine" in result["globals"]
    assert result["layers"][0]["batch_first"] is True
    assert "names code that was not run: elsewhere.Mine" in run("inspect", str(tmp_path / "whole.pt")).stdout
    assert "elsewhere" not in sys.modules


def test_subclasses_only_when_asked_for(tmp_path, run, run_json):
    import sys
    import types

    class Odd(nn.LSTM):
        pass

    Odd.__module__, Odd.__qualname__ = "elsewhere", "Odd"
    sys.modules["elsewhere"] = module = types.ModuleType("elsewhere")
    module.Odd = Odd
    path, out = tmp_path / "odd.pt", tmp_path / "odd.kru.safetensors"
    try:
        torch.save(nn.Sequential(Odd(3, 4)), path)
    finally:
        del sys.modules["elsewhere"]
    assert "elsewhere.Odd is not torch's own" in run_json("inspect", str(path))["skipped"][0]["reason"]
    assert run("convert", str(path), "--factors", "auto", "-o", str(out)).exit_code == 2
    assert not out.exists()
    assert run_json("convert", str(path), "--factors", "auto", "--subclasses", "-o", str(out))["matrices"]
    assert kruify.convert(nn.Sequential(Odd(3, 4)), subclasses=True)[1].matrices


@pytest.mark.parametrize("model", [(), ("model.pt",)])
def test_backend(folder, run_json, model):
    result = run_json("inspect", *model, "--backend")
    assert result["backend"] == kruify.backend_info()
    assert ("layers" in result) == bool(model)


def test_nothing_to_look_at(run):
    assert run("inspect").exit_code == 2


def test_an_archive_names_code_of_the_user_alone(tmp_path, run):
    torch.jit.trace(torch.nn.Sequential(torch.nn.GRU(2, 2)), torch.zeros(1, 1, 2)).save(tmp_path / "own.ts.pt")
    assert "names code" not in run("inspect", str(tmp_path / "own.ts.pt")).stdout


def test_one_weight_is_told_as_one(folder, run):
    kept = ("--keep", "out", "--keep", "rnn.weight_ih_l0")
    assert run("convert", "model.pt", "--factors", "dense", "--dtype", "int8", *kept).exit_code == 0
    assert "1 weight is stored as int8: rnn.weight_hh_l0" in run("inspect", "model.kru.safetensors").stdout
