"""Wrong sizes are refused with one clear sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kruify.errors import UsageError
from kruify.factors import parse
from kruify.layers import KRUGRU, KRULSTM, KRURNN, KroneckerMatrix, KRULSTMCell


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: KRULSTM(0, 8), "at least 1"),
        (lambda: KRULSTM(4, 8, proj_size=8), "proj_size must be below hidden_size"),
        (lambda: KRURNN(4, 8, nonlinearity="gelu"), "'tanh' or 'relu'"),
        (lambda: KRULSTM(4, 8, dropout=2.0, num_layers=2), "between 0 and 1"),
        (lambda: KRULSTM(4, 8, factors="3x3"), "Specs that fit"),
        (lambda: KRUGRU(4, 8)(torch.zeros(2, 3, 5)), "expected 4 input features, got 5"),
        (lambda: KRUGRU(4, 8)(torch.zeros(2, 3, 4, 1)), "2 or 3 dimensions"),
        (lambda: KRUGRU(4, 8)(torch.zeros(2, 3, 4), torch.zeros(1, 2, 8)), "initial state of shape (1, 3, 8)"),
        (lambda: KRULSTM(4, 8)(torch.zeros(2, 3, 4), torch.zeros(1, 3, 8)), "pair (h_0, c_0)"),
        (lambda: KRULSTMCell(4, 8)(torch.zeros(3, 5)), "(batch, 4)"),
        (lambda: KRULSTMCell(4, 8)(torch.zeros(3, 4), (torch.zeros(2, 8),) * 2), "state tensor"),
        (lambda: KroneckerMatrix([parse("2x2").resolve(4, 4), parse("2x2").resolve(8, 8)]), "one size"),
        (lambda: KRULSTM(4, 8, factors={"weight_hh_l0": [parse("2x2").resolve(8, 8)]}), "expected 4 structures"),
    ],
)
def test_refused(action: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        action()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
