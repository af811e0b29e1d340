"""One run of training: what it keeps, and that an interrupted one goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kruify.errors import UnsupportedError, UsageError
from kruify.training.fitting import fit

STEPS = 12


def setting() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    return nn.Linear(3, 2), x, x @ torch.randn(3, 2)


def run(file: Path | None = None, stop: int = STEPS, lr: float = 0.1) -> tuple[tuple[float, float, int], nn.Linear]:
    model, x, y = setting()

    def progress(done: int, total: int, phase: str) -> None:
        if done == stop < STEPS:
            raise KeyboardInterrupt

    def loss(step: int) -> Tensor:
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:5]
        return (model(x[rows]) - y[rows]).square().mean()

    def error() -> float:
        return float((model(x) - y).norm() / y.norm())

    settings = {"lr": lr}
    return fit(model, loss, error, "it", steps=STEPS, lr=lr, file=file, settings=settings, progress=progress), model


def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole, model = run()
    assert whole[1] < 0.9 * whole[0] and whole[2] == STEPS
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.pt", stop=5)
    for _ in range(2):  # and one that is finished is not run again
        resumed, again = run(tmp_path / "state.pt")
        assert resumed == whole and torch.equal(again.weight, model.weight)
    with pytest.raises(UsageError, match="another run"):
        run(tmp_path / "state.pt", lr=0.2)


def test_weights_that_are_worse_are_not_kept() -> None:
    before, _, _ = setting()
    (first, last, _), model = run(lr=1e3)
    assert first == last and torch.equal(model.weight, before.weight)


def test_an_error_that_is_nan_before_any_step_ends_the_run() -> None:
    with pytest.raises(UnsupportedError, match="of the whole graph on held-out samples are NaN"):
        fit(nn.Linear(1, 1), lambda step: torch.zeros(()), lambda: math.nan, "whole graph", steps=1, lr=0.1)
