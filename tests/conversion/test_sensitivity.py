"""Budgets of bytes shared out by what an error costs in loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kruify
from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import locate
from kruify.conversion.plan import Plan
from kruify.conversion.sensitivity import mean_loss
from kruify.conversion.size import FileSize, plan_size
from kruify.errors import TaskError
from kruify.tasks.base import Task


class Two(nn.Module):
    """Two layers of the same statistics, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.unheard = nn.RNN(64, 64), nn.RNN(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.heard(x)[0], self.unheard(x)[0]])


class Hear(Task):
    """The outputs of a network as it was, those of one layer nearly without weight."""

    metric = "error"
    higher_is_better = False

    def __init__(self, known: nn.Module) -> None:
        self.known = known

    def model(self) -> nn.Module:
        return Two()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            x = torch.randn(12, 8, 64, generator=generator)
            with torch.no_grad():
                yield x, self.known(x)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch[0])
        return found

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        heard, unheard = (outputs - batch[1]).square().mean((1, 2, 3))
        total: Tensor = heard + 0.01 * unheard
        return total

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        with torch.no_grad():
            return {"error": sum(float(self.loss(self.forward(model, b), b)) for b in self.batches(split)) / 4}


def test_the_bytes_go_where_the_loss_needs_them() -> None:
    """By energy both layers get as many, though one of them hardly counts."""
    torch.manual_seed(0)
    net = Two()
    task, file = Hear(net), FileSize(net.state_dict(), locate(net).layers, source_sha256="")
    budget = f"size={int(0.6 * file.of(Plan()))}"
    by_energy = plan_size(file, budget, moments=calibrate(net, task))
    small, conversion = kruify.convert(net, budget=budget, task=task)
    assert file.of(conversion.plan) <= file.limit(budget)
    other, _ = kruify.convert(net, plan=by_energy, task=task)
    assert task.evaluate(small, "test")["error"] < 0.5 * task.evaluate(other, "test")["error"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": lambda outputs, batch: outputs.mean((1, 2, 3))}, r"of shape \(2,\), not one number"),
        ({"batches": lambda split, seed: iter(())}, 'split "train" has no batches'),
    ],
)
def test_a_task_without_a_mean_loss(changed: dict[str, Any], message: str) -> None:
    task = Hear(Two())
    vars(task).update(changed)
    with pytest.raises(TaskError, match=message):
        mean_loss(Two(), task)
