"""Plan, convert, fine-tune and evaluate in one go; back off layer by layer until the loss is within `max_drop`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.checkpoint import Checkpoint
from kruify.conversion import Conversion
from kruify.conversion.budget import Slack, make_budget_plan, parse_budget
from kruify.conversion.plan import LayerPlan, Plan, make_plan, matching
from kruify.errors import UsageError
from kruify.progress import Progress
from kruify.search.candidate_search import SHARE, CandidateSearch
from kruify.search.candidates import Candidate, CandidateResult, Choice, Selection
from kruify.search.job_state import JobState
from kruify.search.max_drop import allowed_drop, drop_from
from kruify.search.workers import Ray, check_ray
from kruify.tasks.base import Task
from kruify.training import Recipe

GROWTH = 2.0  # a layer that costs too much gets so many times its parameters
DENSE_FROM = 0.5  # a layer that would keep more than this share of its parameters is left dense


@dataclass(frozen=True)
class Attempt:
    """One round: what each layer kept, and what that cost.

    Attributes:
        shares: layer name -> parameters of its recurrent matrices after / before; 1 for dense.
        recurrent_after: numbers in all recurrent matrices.
        recurrent_ratio: how many times fewer these are than before.
        metrics: on the validation split, after fine-tuning.
        drop: how much worse than the dense network `task.metric` is, in its own units; negative if better.
        bytes: of its file, under a budget of bytes.
    """

    shares: dict[str, float]
    recurrent_after: int
    recurrent_ratio: float
    metrics: dict[str, float]
    drop: float
    bytes: int | None = None


@dataclass(frozen=True)
class Compression:
    """What `compress` found.

    Attributes:
        model: the network of the first attempt within `max_drop`, or else of the nearest one.
        within: whether it is within.
        best: index of the attempt that `model` is from.
        baseline: the dense network's metrics on the validation split.
        candidates: results of the candidates that were tried before the first attempt.
        attempts: in order.
        latency: what was timed under a budget of time, of the first attempt.
        allowed: the drop that was allowed, in the metric's units; None without a bound.
        slack: what the limits of the budget allow, one of time left out, and how much of it `model` takes.
        lr: peak learning rate of the training.
        history: the validations of the training that gave `model`, as `FinetuneResult.to_json` has them.
        notes: metadata of a file of `model`: its history and recipe, where a budget of bytes leaves room.
    """

    model: nn.Module
    within: bool
    best: int
    baseline: dict[str, float]
    candidates: list[CandidateResult]
    attempts: list[Attempt]
    latency: dict[str, Any] | None = None
    allowed: float | None = None
    slack: list[Slack] = field(default_factory=list)
    lr: float = Recipe.lr
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but model and notes, and a latency that was not asked for; the candidates stand under `trials`."""
        return {
            "within": self.within,
            "best": self.best,
            "baseline": self.baseline,
            "trials": [result.to_json() for result in self.candidates],
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "allowed_drop": self.allowed,
            "budget": [asdict(slack) for slack in self.slack],
            "lr": self.lr,
            "history": self.history,
            **({} if self.latency is None else {"latency": self.latency}),
        }


def compress(
    dense: nn.Module,
    task: Task,
    budget: str,
    *,
    max_drop: float | str | None = None,
    attempts: int = 4,
    share: float = SHARE,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    input_factors: str | None = None,
    source: Checkpoint | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    on_candidate: Callable[[CandidateResult], None] | None = None,
    on_attempt: Callable[[Attempt], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    ray: Ray = False,
    **recipe: Any,
) -> Compression:
    """A converted and fine-tuned copy of `dense` that loses at most `max_drop` of the task's metric.

    The budget is planned over all recurrent matrices, one of bytes or of time over the input matrices, too, one of
    bytes also over linear layers and embeddings, weighed by the activations on the task, and the structures and the
    learning rate that recover best in a short training are taken (search.candidate_search). If the network validates
    worse than allowed after fine-tuning, the layer whose matrices lost most of their output gets twice the parameters
    (or stays dense), the other layers keep what they learnt, and fine-tuning starts again.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        budget: "16x", "params=10%", ... (kruify.conversion.budget.parse_budget); "size=8x", "size=600kB" of the file of
            the whole network, "latency=3x" of the time of its layers, which `max_drop` may go beyond.
        max_drop: in units of `task.metric`, or "1%" of the dense network's value, on the validation split; None takes
            the first attempt as it is.
        attempts: at most so many rounds of fine-tuning.
        share: of the epochs for which each candidate structure is trained; 0 takes what keeps the most energy.
        only, skip, overrides: patterns of what may be factored, and how (conversion.plan.make_plan).
        input_factors: spec of the input matrices under a budget of the recurrent ones.
        source: the file that holds `dense`, if one does.
        progress: told of the calibration, the search for factors, and the steps of each training.
        dtype, keep: how the weights are stored (kruify.quantize); if not said under a budget of bytes, int8 or int4.
        on_candidate, on_attempt: called after each short training, after each round.
        resume: a folder for the state of candidates and rounds. If it is empty or missing compression begins, else it
            goes on and ends with the same bits as if it had never been interrupted; `max_drop` and `attempts` may
            differ.
        ray: True or the address of a cluster: each candidate is a task of Ray (search.workers).
        log_dir: a folder for `history.csv` of every training, in folders `candidate-1`, `attempt-1`, ... there.
        recipe: options of kruify.training.Recipe, such as epochs.

    Raises:
        UsageError: no recurrent layer, a bad option, or `resume` holds another compression.
        PlanError: the budget cannot be met.
    """
    if attempts < 1:
        raise UsageError(f"at least one attempt is needed, got {attempts}", "compress")
    parse_budget(budget)
    allowed_drop(max_drop, 0.0)
    check_ray(ray)
    search = CandidateSearch(
        dense, task, share=share, source=source, seed=seed, device=device, progress=progress, dtype=dtype, keep=keep,
        selection=Selection(tuple(only), tuple(skip), overrides or {}, input_factors), log_dir=log_dir, **recipe,
    )  # fmt: skip
    folder = None if resume is None else Path(resume)
    state = JobState(folder, "compression", {**search.settings, "budget": budget})
    allowed = allowed_drop(max_drop, search.baseline[task.metric])
    if state.found:
        choice = state.read(lambda found: Choice.from_json(found, search.moments))
    else:
        found = search.candidates(budget)
        state.keep()
        choice = search.choose(found, folder, on_candidate=on_candidate, ray=ray)
        state.keep(**choice.to_json())
    candidate, learnt = choice.candidate, dict[str, Tensor]()
    best, tried = 0, list[Attempt]()
    while True:
        student, conversion = search.convert(candidate)
        student.load_state_dict({**student.state_dict(), **learnt})
        number = len(tried) + 1
        kept_in = None if folder is None else folder / f"attempt-{number}"
        run = search.train(student, candidate.lr, kept_in, f"attempt {number}")
        notes, slack = search.notes(candidate, run, budget)
        size = next((limit.used for limit in slack if limit.of == "bytes"), None)
        attempt = _attempt(search, conversion, search.evaluations.measure(run.model, "valid"), size)
        tried.append(attempt)
        if on_attempt is not None:
            on_attempt(attempt)
        within = allowed is None or attempt.drop <= allowed
        if within or len(tried) == 1 or attempt.drop < tried[best].drop:
            best, best_run, best_notes, best_slack = len(tried) - 1, run, notes, slack
        before, stop = candidate.plan, within or len(tried) == attempts or not conversion.matrices
        if not stop:
            worst = _most_lost(conversion)
            candidate = _grown(search, candidate, worst, attempt.shares.get(worst, 1.0) * GROWTH)
        if stop or candidate.plan == Plan() or candidate.plan == before:
            break
        learnt = {n: t for n, t in run.model.state_dict().items() if not n.startswith(f"{worst}.")} if worst else {}
    return Compression(
        model=best_run.model,
        within=within,
        best=best,
        baseline=search.baseline,
        candidates=choice.results,
        attempts=tried,
        latency=choice.candidate.latency,
        allowed=allowed,
        slack=best_slack,
        lr=candidate.lr,
        history=best_run.to_json()["history"],
        notes=best_notes,
    )


def _attempt(search: CandidateSearch, conversion: Conversion, metrics: dict[str, float], size: int | None) -> Attempt:
    before = {layer.name: layer.recurrent_parameters for layer in search.layers}
    kept = dict(before)
    for matrix in conversion.matrices:
        if "weight_hh" in matrix.name.rpartition(".")[2]:
            kept[matrix.layer] += matrix.parameters_after - matrix.parameters_before
    after, metric = sum(kept.values()), search.task.metric
    return Attempt(
        shares={name: kept[name] / count for name, count in before.items()},
        recurrent_after=after,
        recurrent_ratio=sum(before.values()) / max(1, after),
        metrics=metrics,
        drop=drop_from(search.baseline[metric], metrics[metric], search.task.higher_is_better),
        bytes=size,
    )


def _most_lost(conversion: Conversion) -> str:
    """The layer whose matrices lost the largest share of their output when they were decomposed; one beside the
    recurrent ones, whose outputs do not compare with gates, where no other is left."""
    lost: dict[str, list[float]] = {}
    recurrent = {item.layer.name for item in conversion.plan.layers}
    for matrix in [m for m in conversion.matrices if m.layer in recurrent] or conversion.matrices:
        kept = matrix.energy if matrix.energy_weighted is None else matrix.energy_weighted
        lost.setdefault(matrix.layer, []).append(1 - kept)
    return max(lost, key=lambda name: (sum(lost[name]) / len(lost[name]), name))


def _grown(search: CandidateSearch, candidate: Candidate, name: str, share: float) -> Candidate:
    """The candidate with layer `name` planned anew for a larger share of its parameters, or left dense, as one beside
    the recurrent ones is."""
    layers, beside, selection = list[LayerPlan](), list[LayerPlan](), search.selection
    for item in candidate.plan.beside:
        if item.layer.name != name or matching(item.layer, selection.overrides):
            beside.append(item)
    for item in candidate.plan.layers:
        fixed = matching(item.layer, selection.overrides)
        if item.layer.name != name:
            layers.append(item)
        elif share < DENSE_FROM:
            budget = f"params={100 * share:.6f}%"
            inputs = any("weight_ih" in weight for weight in item.matrices) and selection.input_factors is None
            layers += make_budget_plan(
                search.tensors, [item.layer], budget, input_budget=budget if inputs else None,
                input_factors=selection.input_factors, only=[item.layer.full_name(weight) for weight in item.matrices],
                overrides=fixed, moments=search.moments, seed=search.seed, progress=search.progress,
            ).layers  # fmt: skip
        elif fixed:
            layers += make_plan([item.layer], "dense", "dense", overrides=fixed).layers
    return replace(candidate, plan=Plan(layers, beside))
