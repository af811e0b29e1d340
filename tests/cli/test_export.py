"""`kruify export`: what is written runs as the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kruify.cli.export import _sentence
from kruify.exporting import Exported
from kruify.graphs.comparison import Comparison, Timing


def test_dense_state_dict_loads_into_the_dense_network(folder, run_json):
    source = torch.load("model.pt")
    run_json("convert", "model.pt", "--factors", "4*(4x4,2x2)", "-o", "kru.safetensors")  # all terms
    (file,) = run_json("export", "kru.safetensors", "--to", "dense", "-o", "back.pt")["outputs"]
    assert file["output"] == "back.pt"
    assert file["bytes"] == Path("back.pt").stat().st_size
    assert file["difference"] < 1e-5
    back = torch.load("back.pt", weights_only=True)
    assert list(back) == list(source)
    for name in source:
        torch.testing.assert_close(back[name], source[name], rtol=1e-5, atol=1e-6)


def test_torch_program_runs(folder, run_json):
    pytest.importorskip("torch.export")
    run_json("convert", "model.pt", "--factors", "2x2")
    (file,) = run_json("export", "model.kru.safetensors", "--to", "torch", "-o", "layer.pt2")["outputs"]
    assert file["layer"] == "rnn"
    program = torch.export.load(file["output"]).module()
    assert program(torch.randn(5, 2, 3), torch.zeros(1, 2, 8))[0].shape == (5, 2, 8)


def test_refusals(folder, run):
    torch.save(nn.Linear(2, 2).state_dict(), "plain.pt")
    for arguments in (
        ["model.pt", "--to", "dense"],
        ["plain.pt", "--to", "torch"],
        ["model.pt", "--to", "torch", "--original", "missing.pt"],
    ):
        result = run("export", *arguments, "-o", "out.pt")
        assert result.exit_code == 2, result.stderr
        assert not Path("out.pt").exists()


@pytest.mark.parametrize(("run_ms", "said"), [((2.0, 5.0), True), ((2.0, 2.1), False), (None, False)])
def test_factors_that_are_slower_than_dense_weights_are_said_to_be(run_ms, said):
    beside = Comparison(1e-6, timing=None if run_ms is None else Timing((1.0, 1.0), run_ms))
    file = Exported(Path("a.onnx"), "", ("input",), ("output",), 1e-7, 3, 100, beside_dense=beside)
    assert ("2.5 times as long as dense weights" in _sentence(file)) is said
