"""Compress until it costs too much: convert, fine-tune, evaluate, and give back what the worst layer needs.

A budget is a wish, the drop is the contract: where the fine-tuned network is further from the dense one than the
contract allows, the layer that answers the teacher's inputs worst gets twice the parameters, or stays dense, and
training goes on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kruify.convert import convert_module, plan_of
from kruify.errors import UsageError
from kruify.finetune.distill import Distillation
from kruify.finetune.finetune import finetune
from kruify.finetune.recipe import Recipe
from kruify.finetune.recurrent import recurrent_layers
from kruify.finetune.result import OnProgress
from kruify.locate import RecurrentLayer, locate
from kruify.plan import Plan, make_plan
from kruify.task import Task, evaluating, to_device

Spec = Callable[[int, int, float], str]  # rows and columns of a gate, share of its parameters -> factor spec
DENSE_SHARE = 0.5  # a matrix that needs this much is left dense: it would save little and cost time
PROBES = 8  # batches of "valid" on which layers are compared with the teacher's


@dataclass
class Round:
    """One attempt: the share of its recurrent parameters that each layer had (1 for dense), and what came of it."""

    shares: dict[str, float]
    metrics: dict[str, float]
    drop: float
    layer_errors: dict[str, float]


@dataclass
class Compression:
    """Outcome of `compress`.

    Attributes:
        model: the smallest network within the contract; if there is none, the one that came nearest.
        plan: what became of each matrix; without layers if all are dense again.
        dense_metrics, metrics: on "valid", of the dense network and of `model`.
        drop: relative loss of the task's metric, negative for a gain.
        reached: whether `drop` is within the contract.
        rounds: every attempt, the first one first.
    """

    model: nn.Module
    plan: Plan
    dense_metrics: dict[str, float]
    metrics: dict[str, float]
    drop: float
    reached: bool
    rounds: list[Round] = field(default_factory=list)


def compress(
    model: nn.Module,
    task: Task,
    times: float,
    *,
    max_drop: float = 0.01,
    max_rounds: int = 4,
    spec: Spec | None = None,
    recipe: Recipe | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
    on_round: Callable[[Round], None] | None = None,
    **changes: Any,
) -> Compression:
    """Make the recurrent matrices of a trained dense network `times` smaller, as far as its accuracy allows.

    Args:
        model: the dense network; it is left alone and teaches.
        max_drop: greatest relative loss of the task's metric on "valid": 0.01 is 1 % of the dense network's figure.
        max_rounds: attempts, the first included.
        spec: structure of a gate; None for `low_rank_and_sparse`.
        recipe, changes, resume, device, on_progress: of every round, as in `finetune`.
        on_round: called after every attempt.

    Raises:
        UsageError: the network has no recurrent layer of torch.nn, or a number makes no sense.
    """
    if times <= 1 or max_drop < 0 or max_rounds < 1:
        raise UsageError(f"a budget of {times:g}x, a drop of {max_drop:g}, {max_rounds} rounds: not above 1, 0 and 0")
    layers = locate(model).layers
    if not layers:
        raise UsageError("there is no RNN, LSTM or GRU layer to convert", type(model).__name__)
    dense_metrics = {name: float(value) for name, value in task.evaluate(model, "valid").items()}
    shares = {layer.name: 1 / times for layer in layers}
    rounds: list[Round] = []
    best: Compression | None = None
    student: nn.Module | None = None
    relaxed = ""
    for number in range(1, max_rounds + 1):
        plan = plan_for(layers, shares, spec or low_rank_and_sparse)
        if not plan.layers:
            break
        student = next_student(model, plan, student, relaxed)
        folder = None if resume is None else Path(resume) / f"round-{number}"
        result = finetune(
            student,
            task,
            teacher=model,
            recipe=recipe,
            resume=folder,
            device=device,
            on_progress=on_progress,
            **changes,
        )
        drop = relative_drop(result.metrics[task.metric], dense_metrics[task.metric], task.higher_is_better)
        errors = layer_errors(student, model, task)
        rounds.append(Round(dict(shares), result.metrics, drop, errors))
        if on_round is not None:
            on_round(rounds[-1])
        if best is None or drop < best.drop:
            kept = copy.deepcopy(student)
            best = Compression(kept, plan_of(kept), dense_metrics, result.metrics, drop, drop <= max_drop, rounds)
        if drop <= max_drop:
            return best
        relaxed = max(errors, key=lambda name: errors[name])
        shares[relaxed] = 1.0 if 2 * shares[relaxed] >= DENSE_SHARE else 2 * shares[relaxed]
    if best is None:
        raise UsageError(
            f"at {times:g}x every matrix would stay dense", type(model).__name__, "Ask for a smaller network"
        )
    return best


def low_rank_and_sparse(rows: int, cols: int, share: float) -> str:
    """Half of the parameters in outer products, half in single entries: the structure of the default recipe."""
    rank = max(1, int(share * rows * cols / 2 / (rows + cols)))
    return f"{rank}*({rows}x1,1x{cols})+sparse:{50 * share:.6g}%:1"


def plan_for(layers: list[RecurrentLayer], shares: Mapping[str, float], spec: Spec) -> Plan:
    """The plan in which each layer's recurrent matrices keep its share of parameters; 1 leaves them dense."""
    specs = {}
    for layer in layers:
        for suffix in layer.suffixes:
            weight, share = f"weight_hh{suffix}", shares[layer.name]
            specs[layer.full_name(weight)] = spec(*layer.shape(weight), share) if share < 1 else "dense"
    return make_plan(layers, overrides=specs)


def next_student(model: nn.Module, plan: Plan, previous: nn.Module | None, relaxed: str) -> nn.Module:
    """The network of the next round: the relaxed layer anew from the dense network, all else as the last round left
    it."""
    student, _ = convert_module(model, plan)
    if previous is None:
        return student
    carried = copy.deepcopy(previous)
    layers = recurrent_layers(student)
    for name, layer in layers.items():
        if name == relaxed:
            if not name:
                return student
            carried.set_submodule(name, layer)
    return carried.to(next(student.parameters()).device)


def layer_errors(student: nn.Module, teacher: nn.Module, task: Task) -> dict[str, float]:
    """Converted layer -> how far its answers to the teacher's inputs are from the teacher's (relative, squared)."""
    distillation = Distillation(student, teacher, task, Recipe())
    totals: dict[str, float] = {}
    with evaluating(student) as device:
        for batch in islice(iter(task.batches("valid")), PROBES):
            for name, distance in distillation.distances(to_device(batch, device)).items():
                totals[name] = totals.get(name, 0.0) + float(distance)
    return totals


def relative_drop(value: float, dense: float, higher_is_better: bool) -> float:
    """How much worse `value` is than `dense`, as a share of it."""
    worse = dense - value if higher_is_better else value - dense
    return worse / abs(dense) if dense else worse
