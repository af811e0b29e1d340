"""The result of a fine-tuning run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kruify.training.recurrent_conditioning import RecurrentConditioning


@dataclass(frozen=True)
class Validation:
    """One entry of the history of a run.

    Attributes:
        phase: "start" (the network as it came), "heal" or "train".
        epoch: epochs done, of all phases together; 0 at the start.
        step: optimiser steps done, of all phases together.
        loss: mean training loss of the epoch; None at the start.
        penalty: the soft unitary penalty, not multiplied by lambda.
        lr: learning rate at the end of the epoch.
        metrics: name -> value on the "valid" split.
        conditioning: where it was asked for.
    """

    phase: str
    epoch: int
    step: int
    loss: float | None
    penalty: float
    lr: float
    metrics: dict[str, float]
    conditioning: RecurrentConditioning | None = None

    def to_json(self) -> dict[str, Any]:
        """`phase epoch step loss penalty lr metrics`, and `conditioning` where it was measured."""
        entry = asdict(self)
        if self.conditioning is None:
            del entry["conditioning"]
        return entry


@dataclass(frozen=True)
class FinetuneResult:
    """Outcome of `finetune`.

    Attributes:
        model: the network given, now with the weights that validated best.
        history: one entry per validation.
        metrics: name -> value on the "valid" split, of the weights kept.
        best_epoch: the epoch they come from.
        steps: optimiser steps done.
        seconds: time spent, resumed runs included.
        stopped_early: whether `patience` ran out.
        is_main: whether this is the process that writes files and prints; all others hold the same result.
    """

    model: nn.Module
    history: tuple[Validation, ...]
    metrics: dict[str, float]
    best_epoch: int
    steps: int
    seconds: float
    stopped_early: bool
    is_main: bool

    def to_json(self) -> dict[str, Any]:
        """`history metrics best_epoch steps seconds`."""
        return {
            "history": [entry.to_json() for entry in self.history],
            "metrics": self.metrics,
            "best_epoch": self.best_epoch,
            "steps": self.steps,
            "seconds": self.seconds,
        }
