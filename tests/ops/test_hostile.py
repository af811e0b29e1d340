"""Wrong shapes, dtypes, strides and layouts are errors, never crashes; `python ops_fuzz.py` runs more of them."""

from __future__ import annotations

import pytest
import torch
from ops_cases import recurrence_arguments
from ops_fuzz import fuzz

pytestmark = pytest.mark.usefixtures("compiled")


def test_fuzz() -> None:
    counts = fuzz(seed=0, rounds=150)
    assert counts["refused"] > 50 and counts["ran"] > 5


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (3, torch.tensor([2, 3]), "never grow"),
        (3, torch.tensor([1, 1]), "h0 has"),
        (3, torch.tensor([2.0, 1.0]), "another dtype"),
        (4, torch.zeros(2, 7, dtype=torch.float64), "h0 has size"),
        (5, None, "c0 belongs"),
        (9, torch.full((20, 2), 10**6, dtype=torch.int32), "outside its gate"),
        (9, torch.full((20, 2), -1, dtype=torch.int32), "outside its gate"),
        (10, torch.zeros(3, dtype=torch.float64), "the bias"),
        (11, [4, 6, 6, 0, 1], "layout ends"),
        (11, [4, 6, 6, 0, 0], "more stages"),
        (12, "elman", "unknown kind"),
    ],
)
def test_contract(position: int, value: object, message: str) -> None:
    arguments = recurrence_arguments("lstm", "tiny", (2, 1))
    arguments[position] = value
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.kruify.recurrence_forward(*arguments)


def test_strided_arguments_are_read_as_they_look() -> None:
    arguments = recurrence_arguments("gru", "pair", (3, 2))
    strided = [
        a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() == 2 and a.is_floating_point() else a
        for a in arguments
    ]
    strided[6] = [s.mT.contiguous().mT for s in arguments[6]]
    for a, b in zip(torch.ops.kruify.recurrence(*arguments), torch.ops.kruify.recurrence(*strided), strict=True):
        assert torch.equal(a, b)
