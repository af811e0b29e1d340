from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kruify.training.processes import Processes


class Two:
    """Stands for accelerate in the first of two processes; the second one's message is given."""

    def __init__(self, other: Tensor) -> None:
        self.other, self.sent = other, torch.empty(0)

    def reduce(self, mine: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.sent = mine.clone()
        return mine + self.other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_gradients_and_numbers_are_added_up(dtype: torch.dtype) -> None:
    processes: Any = Processes("cpu")
    used, unused, elsewhere = (nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in range(3))
    mine, other = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    parameters = [used, unused, elsewhere]

    def message(gradients: list[Tensor | None], extra: list[float]) -> Tensor:
        """What a process sends: recorded from a process that has these gradients."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        processes.count, processes._accelerator = 2, Two(torch.zeros(()))
        processes.sum_gradients(parameters, extra)
        return processes._accelerator.sent

    theirs = message([other, None, other], [2.0, 5.0])
    for parameter, gradient in zip(parameters, (mine, None, None), strict=True):
        parameter.grad = gradient
    processes._accelerator = Two(theirs)
    assert processes.sum_gradients(parameters, [1.0, 0.5]) == [3.0, 5.5]
    torch.testing.assert_close(used.grad, mine + other)
    torch.testing.assert_close(elsewhere.grad, other)
    assert unused.grad is None  # no process used it: the optimiser must leave it alone
