"""Which of several conversions a network recovers from best: each is fine-tuned for a short while.

The energy that a structure keeps tells how good it is before fine-tuning, not how well it learns. A network that moves
far from its teacher does better with few large parts (low rank), one that stays near it with single entries beside
them: on g2p-en and King James the ranking by energy is the same, the one after training is not (benchmarks/recovery).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.conversion import convert_module
from kruify.conversion.budget import make_budget_plan
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import Plan, keeps_scales, make_plan
from kruify.conversion.planner import Searches, parse_budget
from kruify.errors import UsageError
from kruify.tasks.base import Task, measure
from kruify.training import Recipe, finetune
from kruify.training.result import OnProgress

SHARE = 0.25  # of the epochs, for each candidate: a tenth chose what ends 2.6 % worse on King James
CLEAR = 0.1  # of what the best one still lacks to the dense network: a smaller lead is none


@dataclass(frozen=True)
class Candidate:
    """A conversion to try: a plan, and the moments that its fit is weighted with (None for a plain fit)."""

    plan: Plan
    moments: Mapping[str, Moments] | None = None


@dataclass(frozen=True)
class Trial:
    """One candidate: its specs, each named once, and the metrics on the validation split after its short training."""

    factors: list[str]
    metrics: dict[str, float]


def check_share(share: float) -> None:
    """Raises UsageError for a share of the epochs that makes no sense."""
    if not 0 <= share <= 1:
        raise UsageError(f"a trial takes a share of the epochs between 0 and 1, got {share}")


def candidates(
    tensors: Mapping[str, Tensor],
    layers: Sequence[RecurrentLayer],
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    seed: int = 0,
    searches: Searches | None = None,
) -> list[Candidate]:
    """What keeps the most energy (kruify.conversion.budget), then half low rank and half single entries in every gate.

    The second is fitted plainly: weighted with the moments its entries crowd into the columns that the layer drives
    most, and it ends worse.

    Raises:
        PlanError: the budget cannot be met.
    """
    planned = make_budget_plan(tensors, layers, budget, moments=moments, seed=seed, searches=searches)
    limits = parse_budget(budget)
    # Both parts take a multiply-add a number, so that one share serves both limits.
    share = min(limit for limit in (limits.parameters, limits.multiply_adds) if limit is not None)
    specs = {
        layer.full_name(weight): spec
        for layer in layers
        for weight in (f"weight_hh{suffix}" for suffix in layer.suffixes)
        if (spec := half_and_half(*layer.shape(weight), share, keeps_scales(layer))) is not None
    }
    mixed = make_plan(layers, "dense", overrides=specs)
    complete = sum(len(item.matrices) for item in mixed.layers) == sum(len(layer.suffixes) for layer in layers)
    return [Candidate(planned, moments), *([Candidate(mixed)] if complete else [])]


def half_and_half(rows: int, cols: int, share: float, scaled: bool = False) -> str | None:
    """A spec of one gate, half of its numbers low rank and half single entries; None where not even rank 1 fits."""
    numbers, one = int(share * rows * cols), rows + cols + scaled
    rank = numbers // (2 * one)
    percent = 100 * (numbers - rank * one) / (rows * cols)
    return f"{rank}*({rows}x1,1x{cols})+sparse:{percent:.8f}%:1" if rank else None


def choose(
    dense: nn.Module,
    task: Task,
    found: Sequence[Candidate],
    *,
    share: float = SHARE,
    baseline: Mapping[str, float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    resume: Path | None = None,
    **recipe: Any,
) -> tuple[Candidate, list[Trial]]:
    """The candidate that validates best after `share` of the recipe's epochs; the first of those that come near it.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        baseline: metrics of `dense` on the validation split, where they are known.
        on_trial: called after every trial.
        resume: a folder for the states of the trials, which go on where they stopped.
        recipe: options of kruify.finetune.Recipe, for the whole run that the trials are for.

    Returns:
        the candidate, and one trial each. A single candidate is not tried; with a share of 0 the first is taken.
    """
    if len(found) == 1 or not share:
        return found[0], []
    epochs = Recipe().changed(**recipe).epochs * share
    trials = []
    for number, candidate in enumerate(found, 1):
        student = convert_module(dense, candidate.plan, moments=candidate.moments, seed=seed)[0]
        student = finetune(
            student,
            task,
            teacher=copy.deepcopy(dense),
            resume=None if resume is None else resume / f"trial-{number}",
            device=device,
            on_progress=on_progress,
            seed=seed,
            **{**recipe, "epochs": epochs, "evaluate_first": False},
        ).model
        specs = dict.fromkeys(str(s) for _, _, structures in candidate.plan.matrices() for s in structures)
        trials.append(Trial(list(specs), measure(task, student, "valid")))
        if on_trial is not None:
            on_trial(trials[-1])
    sign = -1 if task.higher_is_better else 1
    baseline = baseline or measure(task, dense, "valid", known=True)
    losses = [sign * trial.metrics[task.metric] for trial in trials]
    return found[first_of_the_best(losses, sign * baseline[task.metric])], trials


def to_json(chosen: Candidate, trials: Sequence[Trial]) -> dict[str, Any]:
    """What `choose` gave, but for the moments, which `calibrate` gives again."""
    weighted = chosen.moments is not None
    return {"plan": chosen.plan.to_json(), "weighted": weighted, "trials": [asdict(trial) for trial in trials]}


def from_json(found: Mapping[str, Any], moments: Mapping[str, Moments]) -> tuple[Candidate, list[Trial]]:
    """The other way."""
    chosen = Candidate(Plan.from_json(found["plan"]), moments if found["weighted"] else None)
    return chosen, [Trial(**trial) for trial in found["trials"]]


def first_of_the_best(losses: Sequence[float], dense: float) -> int:
    """The first that is as good as the best but for `CLEAR` of what that one lacks to the dense network.

    Single entries learn faster at first and take more time a step (benchmarks/recovery): where they stand behind low
    rank in the list of candidates, their lead must be a clear one.
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    least = min(known)
    bound = least + CLEAR * max(0.0, least - dense)
    return next(i for i, loss in enumerate(known) if loss <= bound)
