"""copy-memory: remember ten symbols over T steps of nothing (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.errors import TaskError
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask
from kruify.tasks.base import check_split, evaluating, to_device

SYMBOLS, RECALLED = 8, 10
BLANK, DELIMITER = SYMBOLS, SYMBOLS + 1
_EXAMPLES = {"valid": 200, "test": 1000}
_SEEDS = {"valid": 1_000_001, "test": 1_000_002}
_EVALUATION_BATCH = 100


@dataclass(eq=False)
class CopyMemory(SequenceTask):
    """Input: 10 random symbols of 8, T-1 blanks, a delimiter, 10 blanks. Output: T+10 blanks, then the 10 symbols.

    A network without memory answers blanks and guesses: 10 log2(8) / (T+20) bits per step.

    Args:
        T: steps over which the symbols must be kept, at least 1.
        train_examples: freshly drawn sequences in an epoch.
    """

    T: int = 1000
    train_examples: int = 6400
    cell: str = "rnn"

    metric = "bits"
    output_kind = "softmax"
    measures = (
        "Whether ten symbols are remembered over T blank steps: cross entropy in bits per step, and symbols recalled."
    )
    chance = "30 / (T + 20) bits per step without memory (0.029 at T = 1000), recall 0.125"

    def __post_init__(self) -> None:
        if self.T < 1:
            raise TaskError(f"copy-memory cannot have T={self.T}", hint="T is at least 1")

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(SYMBOLS + 2, SYMBOLS + 2, self, one_hot=True)

    def examples(self, split: str) -> int:
        return self.train_examples if check_split(split) == "train" else _EXAMPLES[split]

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x, y (batch, T + 20) int64. "train" is drawn anew for every seed."""
        train = check_split(split) == "train"
        generator = torch.Generator().manual_seed(seed if train else _SEEDS[split])
        size = self.batch_size if train else _EVALUATION_BATCH
        for start in range(0, self.examples(split), size):
            yield _draw(min(size, self.examples(split) - start), self.T, generator)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy of all T + 20 steps in nats."""
        return functional.cross_entropy(outputs.flatten(0, 1), batch.y.flatten())

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return {"bits": cross entropy per step, "recall": share of the ten symbols that are right}."""
        nats = right = 0.0
        with evaluating(model) as device:
            for batch in self.batches(split):
                batch = to_device(batch, device)
                outputs = self.forward(model, batch)
                nats += float(self.loss(outputs, batch)) * len(batch.x)
                recalled = outputs[:, -RECALLED:].argmax(-1) == batch.y[:, -RECALLED:]
                right += float(recalled.float().mean()) * len(batch.x)
        count = self.examples(split)
        return {"bits": nats / count / math.log(2), "recall": right / count}


def _draw(count: int, blanks: int, generator: torch.Generator) -> Batch:
    symbols = torch.randint(SYMBOLS, (count, RECALLED), generator=generator)
    x = torch.full((count, blanks + 2 * RECALLED), BLANK)
    x[:, :RECALLED] = symbols
    x[:, RECALLED + blanks - 1] = DELIMITER
    y = torch.full_like(x, BLANK)
    y[:, -RECALLED:] = symbols
    return Batch(x, y)
