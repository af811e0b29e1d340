"""Whole modules pickled by version 0.1.0 before the package was rearranged load and compute what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("modules_0.1.0.pt")
NAMES = ("lstm", "lstm_projected", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell", "kru")


@pytest.mark.parametrize("name", NAMES)
def test_pickled_module_computes_what_it_did(name: str):
    saved = torch.load(FILE, weights_only=False)[name]
    with torch.no_grad():
        found = saved["module"](saved["input"])
    torch.testing.assert_close(found, saved["output"], rtol=1e-5, atol=1e-6)
