"""copy-memory: remember ten symbols over T steps of nothing (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kruify.errors import TaskError
from kruify.tasks._sequence import Batch, GeneratedTask, SequenceNetwork

SYMBOLS, RECALLED = 8, 10
BLANK, DELIMITER = SYMBOLS, SYMBOLS + 1


@dataclass(eq=False)
class CopyMemory(GeneratedTask):
    """Input: 10 random symbols of 8, T-1 blanks, a delimiter, 10 blanks. Output: T+10 blanks, then the 10 symbols.

    A network without memory answers blanks and guesses: 10 log2(8) / (T+20) bits per step.

    Args:
        T: steps over which the symbols must be kept, at least 1.
    """

    T: int = 1000

    metric = "bits"
    output_kind = "softmax"
    measures = (
        "Whether ten symbols are remembered over T blank steps: cross entropy in bits per step, and symbols recalled."
    )
    chance = "30 / (T + 20) bits per step without memory (0.029 at T = 1000), recall 0.125"
    drawn: ClassVar = {"valid": (200, 1_000_001), "test": (1000, 1_000_002)}
    evaluation_batch = 100

    def __post_init__(self) -> None:
        if self.T < 1:
            raise TaskError(f"copy-memory cannot have T={self.T}", hint="T is at least 1")

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(SYMBOLS + 2, SYMBOLS + 2, self, one_hot=True)

    def draw(self, count: int, generator: torch.Generator, *, train: bool) -> Batch:
        """Return x, y (count, T + 20) int64."""
        symbols = torch.randint(SYMBOLS, (count, RECALLED), generator=generator)
        x = torch.full((count, self.T + 2 * RECALLED), BLANK)
        x[:, :RECALLED] = symbols
        x[:, RECALLED + self.T - 1] = DELIMITER
        y = torch.full_like(x, BLANK)
        y[:, -RECALLED:] = symbols
        return Batch(x, y)

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        """Return "bits", cross entropy per step, and "recall", the share of the ten symbols that are right."""
        right = outputs[:, -RECALLED:].argmax(-1) == batch.y[:, -RECALLED:]
        bits = float(self.loss(outputs, batch)) / math.log(2)
        return {"bits": bits * len(batch.x), "recall": float(right.float().mean()) * len(batch.x)}
