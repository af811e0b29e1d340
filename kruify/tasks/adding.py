"""adding: the sum of two marked numbers among T (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.errors import TaskError
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask
from kruify.tasks.base import check_split, evaluating, to_device

_EXAMPLES = {"valid": 1000, "test": 10_000}
_SEEDS = {"valid": 2_000_001, "test": 2_000_002}
_EVALUATION_BATCH = 500


@dataclass(eq=False)
class Adding(SequenceTask):
    """Input: T numbers, uniform in [0, 1), and beside them marks, one 1 in each half. Output: the marked two's sum.

    Args:
        T: steps, at least 2.
        shortest: the length of every training batch is drawn between this and T, so that what the marks mean can be
            learnt where there is little to remember; 0 for T steps always. "valid" and "test" have T steps.
        train_examples: freshly drawn sequences in an epoch.
    """

    T: int = 100
    shortest: int = 0
    train_examples: int = 6400
    cell: str = "rnn"

    metric = "mse"
    measures = "The sum of two marked numbers among T: mean squared error."
    chance = "mse 0.167 (always answering 1)"

    def __post_init__(self) -> None:
        if self.T < 2:
            raise TaskError(f"adding cannot have T={self.T}", hint="T is at least 2")
        if self.shortest and not 2 <= self.shortest <= self.T:
            raise TaskError(f"adding cannot have shortest={self.shortest}", hint="It is 0, or from 2 to T")

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(2, 1, self, last=True)

    def examples(self, split: str) -> int:
        return self.train_examples if check_split(split) == "train" else _EXAMPLES[split]

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x (batch, steps, 2) float32, numbers and marks, y (batch, 1). "train" is drawn anew for every seed."""
        train = check_split(split) == "train"
        generator = torch.Generator().manual_seed(seed if train else _SEEDS[split])
        size = self.batch_size if train else _EVALUATION_BATCH
        for start in range(0, self.examples(split), size):
            steps = self.T
            if train and self.shortest:
                steps = int(torch.randint(self.shortest, self.T + 1, (), generator=generator))
            yield _draw(min(size, self.examples(split) - start), steps, generator)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs, batch.y)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return {"mse"}."""
        total = 0.0
        with evaluating(model) as device:
            for batch in self.batches(split):
                batch = to_device(batch, device)
                total += float(self.loss(self.forward(model, batch), batch)) * len(batch.x)
        return {"mse": total / self.examples(split)}


def _draw(count: int, steps: int, generator: torch.Generator) -> Batch:
    numbers = torch.rand(count, steps, generator=generator)
    half = steps // 2
    first = torch.randint(half, (count, 1), generator=generator)
    second = torch.randint(half, steps, (count, 1), generator=generator)
    marks = torch.zeros_like(numbers).scatter_(1, first, 1.0).scatter_(1, second, 1.0)
    return Batch(torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True))
