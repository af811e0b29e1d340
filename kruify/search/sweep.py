"""The trade-off curve: one network converted and fine-tuned under several budgets, and where the curve bends."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kruify.checkpoint import metadata_for, write_safetensors
from kruify.conversion import convert_module, plan_of
from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import locate
from kruify.conversion.planner import Searches, parse_budget
from kruify.errors import UsageError
from kruify.search.candidates import SHARE, Candidate, Trial, candidates, check_share, choose
from kruify.search.job_state import Record, fingerprint
from kruify.tasks.base import Task, measure
from kruify.training import Recipe, finetune
from kruify.training.result import OnProgress


@dataclass(frozen=True)
class Point:
    """One network of the sweep.

    Attributes:
        budget: as it was given; "dense" for the network that the sweep starts from.
        file: the converted and fine-tuned network; None for the dense one.
        recurrent_parameters, total_parameters: numbers in it.
        metrics: on the split of the sweep.
        trials: of the structures that were tried for this budget.
    """

    budget: str
    file: str | None
    recurrent_parameters: int
    total_parameters: int
    metrics: dict[str, float]
    trials: list[Trial] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """All points, the dense network first, then the budgets in order; `knee` is an index, None below 3 points."""

    points: list[Point]
    metric: str
    higher_is_better: bool
    split: str
    knee: int | None


def sweep(
    dense: nn.Module,
    task: Task,
    budgets: Sequence[str],
    folder: str | PathLike[str],
    *,
    split: str = "test",
    trial: float = SHARE,
    source_sha256: str = "",
    seed: int = 0,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
    on_point: Callable[[Point], None] | None = None,
    **recipe: Any,
) -> Sweep:
    """Plans, converts, fine-tunes and evaluates `dense` under each budget, with the structure that recovers best in a
    short trial (kruify.search.candidates).

    The folder keeps every network and what is known so far: an interrupted sweep goes on where it stopped, inside a
    fine-tuning run, too, and further budgets can be added to a finished one.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        budgets: such as "2x", "4x", "params=10%" (kruify.conversion.planner.parse_budget).
        trial: share of the epochs for which every candidate structure is tried; 0 takes what keeps the most energy.
        recipe: options of kruify.finetune.Recipe, such as epochs.

    Raises:
        UsageError: a budget is given twice, no recurrent layer, a bad option, or the folder holds another sweep.
        PlanError: a budget cannot be met.
    """
    for budget in budgets:
        parse_budget(budget)
    if not budgets or len(set(budgets)) != len(budgets):
        raise UsageError(f"a sweep takes different budgets, got {', '.join(budgets) or 'none'}")
    check_share(trial)
    settings = Recipe().changed(seed=seed, **recipe).to_json()
    layers = locate(dense).layers
    if not layers:
        raise UsageError("there is no RNN, LSTM or GRU layer to convert", type(dense).__name__)
    folder = Path(folder)
    asked = {"task": type(task).__name__, "split": split, "trial": trial, "recipe": settings}
    record = Record(folder, "sweep", {"model": fingerprint(dense.state_dict()), **asked})
    known = record.read(_known)
    points, moments = [], None
    training = {"seed": seed, "device": device, "on_progress": on_progress, **recipe}
    searches: Searches = {}  # the budgets of a curve have half of their fits in common
    for budget in ("dense", *budgets):
        point = known.get(budget)
        if point is None:
            if budget == "dense":
                count = sum(layer.recurrent_parameters for layer in layers)
                total = sum(p.numel() for p in dense.parameters())
                point = Point("dense", None, count, total, measure(task, dense, split, known=True))
            else:
                moments = moments or calibrate(dense, task, seed=seed)
                found = candidates(dense.state_dict(), layers, budget, moments=moments, seed=seed, searches=searches)
                file = folder / f"{_safe(budget)}.kru.safetensors"
                point = _make(dense, task, budget, found, trial, file, split, source_sha256, training)
            known[budget] = point
            record.keep(points=[asdict(p) for p in known.values()])
        points.append(point)
        if on_point is not None:
            on_point(point)
    return Sweep(points, task.metric, task.higher_is_better, split, knee(points, task.metric, task.higher_is_better))


def _known(found: Mapping[str, Any]) -> dict[str, Point]:
    """The points whose networks are still there, by budget."""
    points = [Point(**{**p, "trials": [Trial(**t) for t in p["trials"]]}) for p in found.get("points", [])]
    return {p.budget: p for p in points if p.file is None or Path(p.file).exists()}


def _make(
    dense: nn.Module,
    task: Task,
    budget: str,
    found: Sequence[Candidate],
    trial: float,
    file: Path,
    split: str,
    source_sha256: str,
    training: Mapping[str, Any],
) -> Point:
    """Writes the network of one budget."""
    run = file.with_name(file.name.replace(".kru.safetensors", ".run"))
    chosen, trials = choose(dense, task, found, share=trial, resume=run, **training)
    converted, conversion = convert_module(dense, chosen.plan, moments=chosen.moments, seed=training["seed"])
    outcome = finetune(converted, task, teacher=copy.deepcopy(dense), resume=run, **training)
    model = outcome.model.cpu()
    told = {"kruify.history": json.dumps(outcome.history)}
    plan = plan_of(model).to_json()
    metadata = metadata_for(plan, source_sha256=source_sha256, seed=training["seed"], extra=told)
    write_safetensors(file, model.state_dict(), metadata)
    return Point(
        budget,
        str(file),
        recurrent_parameters=int(conversion.parameters["recurrent_after"]),
        total_parameters=sum(p.numel() for p in model.parameters()),
        metrics=measure(task, model, split),
        trials=trials,
    )


def knee(points: Sequence[Point], metric: str, higher_is_better: bool) -> int | None:
    """Index of the point where more compression begins to cost more than it saves; None below 3 points.

    Kneedle's rule (Satopaa et al. 2011): on axes scaled to [0, 1], logarithm of the parameters and loss of the metric,
    the point farthest below the straight line between the ends.
    """
    if len(points) < 3:
        return None
    size = [math.log(max(1, p.recurrent_parameters)) for p in points]
    cost = [-p.metrics[metric] if higher_is_better else p.metrics[metric] for p in points]
    if not all(map(math.isfinite, cost)):
        return None
    gain = [
        _scaled(max(size) - s, max(size) - min(size)) - _scaled(c - min(cost), max(cost) - min(cost))
        for s, c in zip(size, cost, strict=True)
    ]
    return max(range(len(points)), key=lambda i: gain[i])


def _scaled(value: float, span: float) -> float:
    return value / span if span else 0.0


def _safe(budget: str) -> str:
    """A budget as part of a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in budget.replace("%", "pc"))
