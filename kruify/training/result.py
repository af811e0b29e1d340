"""What a fine-tuning run tells: while it runs, and when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        phase: "heal", "warm" or "train".
        epoch: current epoch of all phases together, from 1.
        epochs: epochs of all phases together.
        step, steps: optimiser steps done and to do, of all phases together.
        loss: mean training loss of the current epoch so far.
        lr: learning rate of the last step.
        seconds: time spent, resumed runs included.
        remaining: estimate of the seconds left, None before there is one.
        metrics: of the last validation, empty before the first.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    remaining: float | None
    metrics: dict[str, float]


OnProgress = Callable[[Progress], None]


@dataclass
class FinetuneResult:
    """Outcome of `finetune`.

    Attributes:
        model: the network given, now with the weights that validated best.
        history: one entry a validation: phase, epoch, step, loss (mean over the epoch), penalty (unweighted), lr,
            metrics; conditioning where it was asked for. The first, of epoch 0, is the network as it came, if the
            recipe asked for it.
        metrics: on "valid", of the weights kept.
        best_epoch: the epoch they come from.
        steps: optimiser steps done.
        seconds: time spent, resumed runs included.
        stopped_early: whether `patience` ran out.
        is_main: whether this is the process that writes files and prints; all others hold the same result.
    """

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    is_main: bool = True
