from __future__ import annotations

import pytest
import torch

from kruify.errors import UsageError
from kruify.training.recipe import Recipe
from kruify.training.schedule import SCHEDULES, lr_factor


def test_onecycle_is_torchs() -> None:
    steps = 50
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps + 1, pct_start=15 / 50 + 1e-9, final_div_factor=1e4
    )
    for step in range(steps):
        # torch counts the phases in whole steps: its peak is one step before share * steps
        if step in (0, 14, 15, 16, 30, 49):
            assert lr_factor("onecycle", step / steps, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.02)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peak_is_reached_at_the_end_of_warmup(schedule: str) -> None:
    assert lr_factor(schedule, 0.25, 0.25) == pytest.approx(1)
    assert max(lr_factor(schedule, i / 100, 0.25) for i in range(101)) == pytest.approx(1)
    rising = [lr_factor(schedule, i / 100, 0.25) for i in range(26)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear"])
def test_ends_near_zero(schedule: str) -> None:
    assert lr_factor(schedule, 1.0, 0.1) < 1e-5
    assert lr_factor(schedule, 2.0, 0.1) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_extreme_warmups(schedule: str, warmup: float) -> None:
    assert all(0 <= lr_factor(schedule, i / 10, warmup) <= 1 for i in range(11))


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean epochs"):
        Recipe().changed(epoch=3)


@pytest.mark.parametrize(
    "change",
    [{"lr": 0}, {"epochs": -1}, {"schedule": "x"}, {"patience": -1}, {"accumulate": 0}, {"clip": float("inf")}],
)
def test_senseless_values_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        Recipe().changed(**change)
