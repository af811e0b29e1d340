"""torch.export programs against torch.nn's own layers. Tracing takes seconds a loop: few cases, much in each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kruify
from kruify.conversion import densify
from kruify.exporting import export_torch

CASES: dict[str, tuple[Any, str]] = {
    "lstm, two layers, projection": (nn.LSTM(5, 8, 2, proj_size=4), "2*(4x2,2x2)+diag+sparse:10%"),
    "gru, bidirectional, batch first": (nn.GRU(5, 8, bidirectional=True, batch_first=True), "2*(8x1,1x8)"),
    "lstm, stacked gates": (nn.LSTM(5, 8), "stacked:2*(32x1,1x8)+sparse:10%"),
    "rnn": (nn.RNN(5, 8, nonlinearity="relu"), "2x2"),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path: Path, case: str) -> None:
    layer, spec = CASES[case]
    model, _ = kruify.convert(layer, spec)
    exported = export_torch(model, tmp_path / "layer.pt2")
    program, dense = torch.export.load(exported.path).module(), densify(model)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    for steps, batch in ((1, 1), (9, 2)):
        x = torch.randn(*((batch, steps) if layer.batch_first else (steps, batch)), 5)
        states = [torch.randn(rows, batch, layer.proj_size or 8)]
        if isinstance(layer, nn.LSTM):
            states.append(torch.randn(rows, batch, 8))
        with torch.no_grad():
            output, final = dense(x, tuple(states) if len(states) == 2 else states[0])
            got = program(x, *states)
        for a, b in zip(got, [output, *(final if isinstance(final, tuple) else (final,))], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_dense_and_torchs_own_layer_keep_a_dynamic_length(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.GRU(3, 4), "2x2")
    for layer, dense in ((model, True), (nn.GRU(3, 4), False)):
        program = torch.export.load(export_torch(layer, tmp_path / "layer.pt2", dense=dense).path)
        assert "weight_hh_l0" in {name.rpartition(".")[2] for name in program.state_dict}
        assert program.module()(torch.randn(21, 1, 3), torch.randn(1, 1, 4))[0].shape == (21, 1, 4)


def test_cell_and_loading_without_kruify(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.LSTMCell(3, 4), "2x2")
    export_torch(model, tmp_path / "cell.pt2")
    script = (
        "import sys, torch; sys.modules['kruify'] = None; p = torch.export.load(sys.argv[1]).module();"
        "print([tuple(t.shape) for t in p(torch.ones(5, 3), torch.ones(5, 4), torch.ones(5, 4))])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cell.pt2")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[(5, 4), (5, 4)]\n"
