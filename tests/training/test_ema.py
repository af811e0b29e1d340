from __future__ import annotations

import pytest
import torch
from torch import nn

from kruify.training.ema import Average


def test_is_the_weighted_sum_of_all_weights_so_far() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    values = [torch.full((1, 2), float(v), dtype=torch.float64) for v in (1, 5, -2, 3)]
    model.weight.data.copy_(values[0])
    average = Average(model, 0.3)
    expected = values[0]
    for update, value in enumerate(values[1:], 1):
        model.weight.data.copy_(value)
        average.update(model)
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.shadow["weight"], expected)
    with average.applied(model):
        assert torch.equal(model.weight, average.shadow["weight"])
    assert torch.equal(model.weight, values[-1])


def test_weights_come_back_after_an_error() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    average = Average(model, 0.9)
    average.shadow["weight"].zero_()
    with pytest.raises(RuntimeError, match="interrupted"), average.applied(model):
        raise RuntimeError("interrupted")
    assert torch.equal(model.weight, before)
