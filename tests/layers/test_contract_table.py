"""Every row of docs/python.md's table of what works as in nn.LSTM is run, with kruify's layer and with torch.nn's."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.export import Dim, export
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import kruify
from kruify import layers

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
NAMES: dict[str, Any] = dict(
    copy=copy, pickle=pickle, torch=torch, nn=nn, kruify=kruify, quantize_dynamic=quantize_dynamic, Dim=Dim,
    export=export, parametrizations=parametrizations, prune=prune, weight_norm=weight_norm,
    pack_sequence=pack_sequence, AveragedModel=AveragedModel, checkpoint=checkpoint,
)  # fmt: skip


def rows() -> list[tuple[str, str, list[str]]]:
    """(expression, yes or no, expressions to write instead), one per expression of the first column."""
    section = PAGE.read_text(encoding="utf-8").split("## What works as in nn.LSTM")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in ("yes", "no"):
            instead = [code for code in re.findall(r"`([^`]+)`", cells[2]) if "layer" in code or "dense" in code]
            written = instead if cells[1] == "no" else []
            found += [(code, cells[1], written) for code in re.findall(r"`([^`]+)`", cells[0])]
    return found


def run(code: str, kind: str, ours: bool) -> Any:
    torch.manual_seed(0)
    kru = getattr(layers, f"KRU{kind}")(3, 16, factors="2*(4x4)")
    dense = kruify.densify(kru)
    w = kru.weight_hh_l0.to_dense().detach() / 2
    given = {"layer": kru if ours else copy.deepcopy(dense), "dense": dense, "x": torch.randn(5, 2, 3), "w": w}
    return eval(code, {**NAMES, **given})


def told(found: Any) -> Any:
    """The part of a result that can be compared."""
    if isinstance(found, (tuple, list)):
        return [told(item) for item in found]
    return None if isinstance(found, nn.Module) else found


def test_the_table_is_read() -> None:
    assert len(rows()) > 40


SLOW = ("export(", "torch.compile(", "type(quantize_dynamic(")  # run once; of nn.RNN torch does not know the last
CASES = [(k, *row) for k in ("LSTM", "GRU", "RNN") for row in rows() if k == "LSTM" or not row[0].startswith(SLOW)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "code", "works", "instead"), CASES)
def test_a_row_is_true(kind: str, code: str, works: str, instead: list[str]) -> None:
    try:
        wanted = run(code, kind, ours=False)
    except NotImplementedError:  # forward-mode derivatives of nn.LSTM
        wanted = run(code, kind, ours=True)
    if works == "yes":
        found = run(code, kind, ours=True)
        compare(told(found), told(wanted))
        return
    assert wanted is not False
    try:
        found = run(code, kind, ours=True)
    except Exception:
        found = False
    assert found is False
    assert instead
    for expression in instead:
        assert run(expression, kind, ours=True) is not False


def compare(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            compare(one, other)
    elif isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    else:
        assert found == wanted
