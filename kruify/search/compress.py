"""Plan, convert, fine-tune and evaluate in one go; back off layer by layer until the loss is within the contract."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.conversion import Conversion, convert_module
from kruify.conversion.budget import make_budget_plan
from kruify.conversion.calibration import Moments, calibrate
from kruify.conversion.locate import RecurrentLayer, locate
from kruify.conversion.plan import Plan
from kruify.conversion.planner import parse_budget
from kruify.errors import UsageError
from kruify.search.candidates import SHARE, Trial, candidates, check_share, choose, from_json, to_json
from kruify.search.job_state import Record, fingerprint
from kruify.tasks.base import Task, measure
from kruify.training import Recipe, finetune
from kruify.training.result import OnProgress

GROWTH = 2.0  # a layer that costs too much gets so many times its parameters
DENSE_FROM = 0.5  # a layer that would keep more than this share of its parameters is left dense


@dataclass(frozen=True)
class Attempt:
    """One round: what each layer kept, and what that cost.

    Attributes:
        shares: layer name -> parameters of its recurrent matrices after / before; 1 for dense.
        metrics: on the validation split, after fine-tuning.
        drop: how much worse than the dense network `task.metric` is, in its own units; negative if better.
    """

    shares: dict[str, float]
    recurrent_after: int
    recurrent_ratio: float
    metrics: dict[str, float]
    drop: float


@dataclass(frozen=True)
class Compressed:
    """The network of the last attempt within the contract, or else of the nearest one.

    Attributes:
        trials: of the structures that were tried before the first attempt.
    """

    model: nn.Module
    baseline: dict[str, float]
    attempts: list[Attempt] = field(default_factory=list)
    best: int = 0  # index of the attempt that `model` is from
    within: bool = False
    trials: list[Trial] = field(default_factory=list)


def compress(
    dense: nn.Module,
    task: Task,
    budget: str,
    *,
    max_drop: float | None = None,
    attempts: int = 4,
    trial: float = SHARE,
    seed: int = 0,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    on_attempt: Callable[[Attempt], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    **recipe: Any,
) -> Compressed:
    """A converted and fine-tuned copy of `dense` that loses at most `max_drop` of the task's metric.

    The budget is planned over all recurrent matrices, weighed by the activations on the task, and the structures that
    recover best in a short trial are taken (search.candidates). If the network validates worse than allowed after
    fine-tuning, the layer whose matrices lost most of their output gets twice the parameters (or stays dense), the
    other layers keep what they learnt, and fine-tuning starts again.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        budget: "16x", "params=10%", ... (kruify.conversion.planner.parse_budget).
        max_drop: in units of `task.metric`, on the validation split; None takes the first attempt as it is.
        attempts: at most so many rounds of fine-tuning.
        trial: share of the epochs for which every candidate structure is tried; 0 takes what keeps the most energy.
        on_trial: called after every trial.
        on_attempt: called after every round.
        resume: a folder for the state of trials and rounds. If it is empty or missing compression begins, else it goes
            on and ends with the same bits as if it had never been interrupted; `max_drop` and `attempts` may differ.
        recipe: options of kruify.finetune.Recipe, such as epochs.

    Raises:
        UsageError: no recurrent layer, a bad option, or `resume` holds another compression.
        PlanError: the budget cannot be met.
    """
    if attempts < 1:
        raise UsageError(f"at least one attempt is needed, got {attempts}", "compress")
    check_share(trial)
    parse_budget(budget)
    settings = Recipe().changed(seed=seed, **recipe).to_json()
    layers = locate(dense).layers
    if not layers:
        raise UsageError("there is no RNN, LSTM or GRU layer to compress", type(dense).__name__)
    tensors = dense.state_dict()
    folder = None if resume is None else Path(resume)
    asked = {"task": type(task).__name__, "budget": budget, "trial": trial, "recipe": settings}
    record = Record(folder, "compression", {"model": fingerprint(tensors), **asked})
    moments = calibrate(dense, task, seed=seed)
    baseline = measure(task, dense, "valid", known=True)
    training = {"seed": seed, "device": device, "on_progress": on_progress, **recipe}
    if record.found:
        chosen, trials = record.read(lambda found: from_json(found, moments))
    else:
        found = candidates(tensors, layers, budget, moments=moments, seed=seed)
        record.keep()
        chosen, trials = choose(
            dense, task, found, share=trial, baseline=baseline, on_trial=on_trial, resume=folder, **training
        )
        record.keep(**to_json(chosen, trials))
    plan = chosen.plan
    result = Compressed(dense, baseline, trials=trials)
    learnt: dict[str, Tensor] = {}
    while True:
        converted, conversion = convert_module(dense, plan, moments=chosen.moments, seed=seed)
        converted.load_state_dict({**converted.state_dict(), **learnt})
        state_of = None if folder is None else folder / f"attempt-{len(result.attempts) + 1}"
        student = finetune(converted, task, teacher=copy.deepcopy(dense), resume=state_of, **training).model
        attempt = _attempt(plan, layers, conversion, task, result.baseline, measure(task, student, "valid"))
        result = _with(result, attempt, student, max_drop)
        if on_attempt is not None:
            on_attempt(attempt)
        if result.within or len(result.attempts) == attempts:
            return result
        worst = _most_lost(conversion)
        plan = _grown(plan, worst, attempt.shares[worst] * GROWTH, tensors, moments, seed)
        if not plan.layers:
            return result
        state = student.state_dict()
        learnt = {n: t for n, t in state.items() if not n.startswith(f"{worst}.")} if worst else {}


def _attempt(
    plan: Plan,
    layers: list[RecurrentLayer],
    conversion: Conversion,
    task: Task,
    baseline: dict[str, float],
    metrics: dict[str, float],
) -> Attempt:
    kept = {layer.name: 0 for layer in layers}
    planned = {layer.full_name(weight) for layer, weight, _ in plan.matrices()}
    for matrix in conversion.matrices:
        kept[matrix.layer] += matrix.parameters_after
    for layer in layers:
        dense = [w for suffix in layer.suffixes if layer.full_name(w := f"weight_hh{suffix}") not in planned]
        kept[layer.name] += len(layer.gates) * sum(rows * cols for rows, cols in map(layer.shape, dense))
    drop = metrics[task.metric] - baseline[task.metric]
    return Attempt(
        shares={layer.name: kept[layer.name] / layer.recurrent_parameters for layer in layers},
        recurrent_after=sum(kept.values()),
        recurrent_ratio=sum(layer.recurrent_parameters for layer in layers) / max(1, sum(kept.values())),
        metrics=metrics,
        drop=-drop if task.higher_is_better else drop,
    )


def _with(result: Compressed, attempt: Attempt, student: nn.Module, max_drop: float | None) -> Compressed:
    """`result` after one more attempt: the first within the contract, or else the nearest to it."""
    attempts = [*result.attempts, attempt]
    within = max_drop is None or attempt.drop <= max_drop
    if within or not result.attempts or attempt.drop < result.attempts[result.best].drop:
        best = len(attempts) - 1
        return replace(result, model=copy.deepcopy(student), attempts=attempts, best=best, within=within)
    return replace(result, attempts=attempts)


def _most_lost(conversion: Conversion) -> str:
    """The layer whose matrices lost the largest share of their output when they were decomposed."""
    lost: dict[str, list[float]] = {}
    for matrix in conversion.matrices:
        kept = matrix.energy if matrix.energy_weighted is None else matrix.energy_weighted
        lost.setdefault(matrix.layer, []).append(1 - kept)
    return max(lost, key=lambda name: (sum(lost[name]) / len(lost[name]), name))


def _grown(
    plan: Plan,
    name: str,
    share: float,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    seed: int,
) -> Plan:
    """The plan with layer `name` planned anew for a larger share of its parameters, or left dense."""
    layers = []
    for item in plan.layers:
        if item.layer.name != name:
            layers.append(item)
        elif share < DENSE_FROM:
            budget = f"params={100 * share:.6f}%"
            layers += make_budget_plan(tensors, [item.layer], budget, moments=moments, seed=seed).layers
    return Plan(layers)
