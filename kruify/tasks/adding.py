"""adding: the sum of two marked numbers among T (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kruify.errors import TaskError
from kruify.tasks._sequence import Batch, GeneratedTask, SequenceNetwork


@dataclass(eq=False)
class Adding(GeneratedTask):
    """Input: T numbers, uniform in [0, 1), and beside them marks, one 1 in each half. Output: the marked two's sum.

    Args:
        T: steps, at least 2.
        shortest: the length of every training batch is drawn between this and T, so that what the marks mean can be
            learnt where there is little to remember; 0 for T steps always. "valid" and "test" have T steps.
    """

    T: int = 100
    shortest: int = 0

    metric = "mse"
    measures = "The sum of two marked numbers among T: mean squared error."
    chance = "mse 0.167 (always answering 1)"
    drawn: ClassVar = {"valid": (1000, 2_000_001), "test": (10_000, 2_000_002)}
    evaluation_batch = 500

    def __post_init__(self) -> None:
        if self.T < 2:
            raise TaskError(f"adding cannot have T={self.T}", hint="T is at least 2")
        if self.shortest and not 2 <= self.shortest <= self.T:
            raise TaskError(f"adding cannot have shortest={self.shortest}", hint="It is 0, or from 2 to T")

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(2, 1, self, last=True)

    def draw(self, count: int, generator: torch.Generator, *, train: bool) -> Batch:
        """Return x (count, steps, 2) float32, numbers and marks, y (count, 1)."""
        steps = self.T
        if train and self.shortest:
            steps = int(torch.randint(self.shortest, self.T + 1, (), generator=generator))
        numbers = torch.rand(count, steps, generator=generator)
        half = steps // 2
        first = torch.randint(half, (count, 1), generator=generator)
        second = torch.randint(half, steps, (count, 1), generator=generator)
        marks = torch.zeros_like(numbers).scatter_(1, first, 1.0).scatter_(1, second, 1.0)
        return Batch(torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs, batch.y)
