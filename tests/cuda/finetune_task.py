"""A generated task for KRU layers on a GPU, and its fine-tuning: run by test_gpu.py, also under torchrun.

python tests/cuda/finetune_task.py DEVICE PRECISION     prints the validations as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kruify.layers import KRULSTM
from kruify.tasks.base import Task, evaluating
from kruify.training import finetune

Batch = tuple[Tensor, Tensor]


class Marked(nn.Module):
    """A KRU-LSTM and a classifier on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = KRULSTM(3, 256, factors="2x2", batch_first=True)
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, 3) -> (batch, 4)
        return self.head(self.rnn(x)[0][:, -1])


class Delay(Task):
    """How many steps ago was the marked symbol seen."""

    metric, higher_is_better = "accuracy", True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Marked()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed({"train": 1 + seed, "valid": 2, "test": 3}[split])
        for _ in range(20 if split == "train" else 4):
            x = torch.randn(32, 5, 3, generator=generator)
            y = torch.randint(4, (32,), generator=generator)
            x[:, :, 0] = 0
            x[torch.arange(32), y, 0] = 3
            yield x, y

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        right = total = 0
        device = next(model.parameters()).device
        with evaluating(model):
            for x, y in self.batches(split):
                right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
                total += len(y)
        return {"accuracy": right / total}


def main() -> None:
    device, precision = sys.argv[1:3]
    task = Delay()
    result = finetune(task.model(), task, epochs=3, lr=5e-3, device=device, mixed_precision=precision)
    if result.is_main:
        print(json.dumps([entry["metrics"]["accuracy"] for entry in result.history]))


if __name__ == "__main__":
    main()
