"""The trade-off curve: one network converted and fine-tuned under several budgets, and where the curve bends."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kruify.analysis.contender import int8_network
from kruify.checkpoint import Checkpoint, limits
from kruify.checkpoint.file_bytes import parsed
from kruify.checkpoint.remote import exists, fetch_file, is_remote, send_file
from kruify.checkpoint.writing import as_lazy
from kruify.conversion import plan_of
from kruify.conversion.budget import parse_budget
from kruify.conversion.storing import weight_bytes, write_converted
from kruify.errors import UnsupportedError, UsageError
from kruify.layers.storage import marks
from kruify.notebook import html_table
from kruify.progress import Progress
from kruify.search.candidate_search import SHARE, CandidateSearch
from kruify.search.candidates import CandidateResult, Selection
from kruify.search.job_state import JobState
from kruify.search.workers import Ray, check_ray, spread
from kruify.tasks.base import Task

INT8 = "int8"  # the budget of the rival: no budget is written so


@dataclass(frozen=True)
class Point:
    """One network of the sweep.

    Attributes:
        budget: as it was given; "dense" for the network that the sweep starts from, "int8" for that in eight bits.
        file: the converted and fine-tuned network; None for the dense ones.
        recurrent_parameters, total_parameters: numbers in it.
        bytes: of the file; of the weights of the dense network.
        metrics: on the split of the sweep.
        candidates: results of the candidates that were tried for this budget.
        latency: what was timed under a budget of time.
        lr: peak learning rate of the training.
    """

    budget: str
    file: str | None
    recurrent_parameters: int
    total_parameters: int
    metrics: dict[str, float]
    bytes: int = 0
    candidates: list[CandidateResult] = field(default_factory=list)
    latency: dict[str, Any] | None = None
    lr: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Every attribute but a latency that was not asked for; the candidates stand under `trials`."""
        data = asdict(self)
        data["trials"] = data.pop("candidates")
        return data if self.latency is not None else {k: v for k, v in data.items() if k != "latency"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """The inverse; TypeError, KeyError where `data` holds something else."""
        given = dict(data)
        point: Point = parsed(cls, {"candidates": given.pop("trials"), **given})
        return point


@dataclass(frozen=True)
class Sweep:
    """All points, the dense network first, then the budgets in order; `knee` is an index, None below 3 points.

    Attributes:
        int8: the dense network by torch's dynamic quantisation; None where torch refuses it.
        of_file: whether a budget is one of bytes: then these say how much smaller a network is, else its recurrent
            parameters.
    """

    points: list[Point]
    metric: str
    higher_is_better: bool
    split: str
    knee: int | None
    int8: Point | None = None
    of_file: bool = False

    def smaller(self, point: Point) -> float:
        """How many times smaller than the dense network one is."""
        return _size(self.points[0], self.of_file) / max(1, _size(point, self.of_file))

    def to_json(self) -> dict[str, Any]:
        """The points, the rival, the budget at the knee, the metric and the split."""
        return {
            "points": [point.to_json() for point in self.points],
            "int8": None if self.int8 is None else self.int8.to_json(),
            "knee": None if self.knee is None else self.points[self.knee].budget,
            "metric": self.metric,
            "split": self.split,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: a row a network, the knee marked."""
        dense, *others = self.points
        rows = [
            (
                point.budget + (" (knee)" if self.knee is not None and point is self.points[self.knee] else ""),
                f"{point.recurrent_parameters:,}",
                f"{point.bytes:,}",
                f"{point.metrics[self.metric]:.4f}",
            )
            for point in (dense, *([] if self.int8 is None else [self.int8]), *others)
        ]
        columns = ("budget", "recurrent parameters", "bytes", f"{self.metric}, {self.split} split")
        return html_table(columns, rows)


def sweep(
    dense: nn.Module,
    task: Task,
    budgets: Sequence[str],
    folder: str | PathLike[str],
    *,
    split: str = "test",
    share: float = SHARE,
    source: Checkpoint | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    input_factors: str | None = None,
    log_dir: str | PathLike[str] | None = None,
    on_point: Callable[[Point], None] | None = None,
    ray: Ray = False,
    **recipe: Any,
) -> Sweep:
    """Plans, converts, fine-tunes and evaluates `dense` under each budget, with the structure that recovers best in a
    short training (kruify.search.candidate_search).

    The folder keeps every network and what is known so far: an interrupted sweep goes on where it stopped, inside a
    fine-tuning run, too, and further budgets can be added to a finished one.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        folder: on this machine, or an address that fsspec knows, such as s3://bucket/curve, to which each network goes
            when it is finished: trainings under way are then begun anew.
        budgets: such as "2x", "4x", "params=10%", "size=8x" (kruify.conversion.budget.parse_budget).
        share: of the epochs for which each candidate structure is trained; 0 takes what keeps the most energy.
        source: the file that holds `dense`, if one does.
        progress: told of the calibration, the search for factors, and the steps of each training.
        dtype, keep: how the weights are stored (kruify.quantize); if not said under a budget of bytes, int8 or int4.
        only, skip, overrides, input_factors, log_dir: as in `search.compression.compress`.
        on_point: called after each network.
        ray: True or the address of a cluster: each budget is a task of Ray, and gives the bits that it gives in this
            process; the folder must be an address, or on all its machines, where one that is interrupted goes on.
        recipe: options of kruify.training.Recipe, such as epochs.

    Raises:
        UsageError: a budget is given twice, no recurrent layer, a bad option, or the folder holds another sweep.
        PlanError: a budget cannot be met.
    """
    for budget in budgets:
        parse_budget(budget)
    if not budgets or len(set(budgets)) != len(budgets):
        raise UsageError(f"a sweep takes different budgets, got {', '.join(budgets) or 'none'}")
    check_ray(ray)
    search = CandidateSearch(
        dense, task, share=share, source=source, seed=seed, device=device, progress=progress, dtype=dtype, keep=keep,
        selection=Selection(tuple(only), tuple(skip), overrides or {}, input_factors), log_dir=log_dir, **recipe,
    )  # fmt: skip
    if not is_remote(folder):
        return _sweep(search, budgets, Path(folder), None, split, on_point, ray)
    with tempfile.TemporaryDirectory(prefix="kruify-") as name:
        return _sweep(search, budgets, Path(name), str(folder).rstrip("/"), split, on_point, ray)


def _sweep(
    search: CandidateSearch,
    budgets: Sequence[str],
    folder: Path,
    address: str | None,
    split: str,
    on_point: Callable[[Point], None] | None,
    ray: Ray,
) -> Sweep:
    """The sweep in a folder of this machine, whose results go to an address, if there is one."""
    task = search.task
    if address is not None:
        fetch_file(f"{address}/sweep.json", folder / "sweep.json", limits.JSON)
    state = JobState(folder, "sweep", {**search.settings, "split": split})
    known = state.read(lambda found: _known(found, task.metric))
    order = ("dense", INT8, *budgets)

    def done(point: Point) -> None:
        known[point.budget] = point
        state.keep(points=[known[b].to_json() for b in dict.fromkeys((*order, *known)) if b in known])
        if address is not None:
            send_file(folder / "sweep.json", f"{address}/sweep.json")
        tell(point)

    def tell(point: Point) -> None:
        if on_point is not None:
            on_point(point)

    for budget in order:
        if budget in known:
            tell(known[budget])
        elif budget == "dense":
            done(_dense_point(search, split))
        elif budget == INT8 and (point := _int8_point(known["dense"], search, split)) is not None:
            done(point)
    missing = [budget for budget in budgets if budget not in known]
    make = partial(_make, search, folder, split) if address is None else partial(_make_there, search, address, split)
    for _, point in spread(make, missing, ray, task, search.progress):
        done(point)
    points, bend = [known[budget] for budget in ("dense", *budgets)], (task.metric, task.higher_is_better)
    of_file = any(parse_budget(budget).of_file for budget in budgets)
    return Sweep(points, *bend, split, knee(points, *bend, of_file), known.get(INT8), of_file)


def _known(found: Mapping[str, Any], metric: str) -> dict[str, Point]:
    """The points whose networks are still there, by budget; KeyError for one without the metric."""
    points = list(map(Point.from_json, found.get("points", [])))
    _ = [point.metrics[metric] for point in points]
    there = [p.file is None or (exists(p.file) if is_remote(p.file) else Path(p.file).exists()) for p in points]
    return {point.budget: point for point, found in zip(points, there, strict=True) if found}


def _dense_point(search: CandidateSearch, split: str) -> Point:
    recurrent = sum(layer.recurrent_parameters for layer in search.layers)
    total = sum(p.numel() for p in search.dense.parameters())
    size = weight_bytes(as_lazy(search.tensors))
    return Point("dense", None, recurrent, total, search.evaluations.measure(search.dense, split, known=True), size)


def _int8_point(dense: Point, search: CandidateSearch, split: str) -> Point | None:
    """The dense network in eight bits, which trains nothing; None where torch refuses it."""
    try:
        metrics, size, _ = int8_network(search.dense, search.task, split)
    except UnsupportedError:
        return None
    return replace(dense, budget=INT8, metrics=metrics, bytes=size)


def _make(search: CandidateSearch, folder: Path, split: str, budget: str) -> Point:
    """Writes the network of one budget to BUDGET.kru.safetensors; the state of its training goes to the folder
    BUDGET.run."""
    stem = folder / _file_name(budget)
    run, file = Path(f"{stem}.run"), Path(f"{stem}.kru.safetensors")
    choice = search.choose(search.candidates(budget), run, f"{stem.name} ")
    student, conversion = search.convert(choice.candidate)
    outcome = search.train(student, choice.candidate.lr, run, stem.name)
    model = outcome.model.cpu()
    sha256, (extra, _) = "", search.notes(choice.candidate, outcome, budget)
    if search.source is not None:
        carried, sha256, _ = search.source
        extra = {**carried, **extra}
    state, plan = model.state_dict(), plan_of(model)
    write_converted(file, state, plan, marks(model), source_sha256=sha256, seed=search.seed, extra=extra)
    return Point(
        budget,
        str(file),
        recurrent_parameters=conversion.parameters.recurrent_after,
        total_parameters=sum(p.numel() for p in model.parameters()),
        metrics=search.evaluations.measure(model, split),
        bytes=file.stat().st_size,
        candidates=choice.results,
        latency=choice.candidate.latency,
        lr=choice.candidate.lr,
    )


def _make_there(search: CandidateSearch, address: str, split: str, budget: str) -> Point:
    """`_make` in a folder that is deleted, and the network sent to the address."""
    with tempfile.TemporaryDirectory(prefix="kruify-") as name:
        point = _make(search, Path(name), split, budget)
        assert point.file is not None
        target = f"{address}/{Path(point.file).name}"
        send_file(Path(point.file), target)
        return replace(point, file=target)


def knee(points: Sequence[Point], metric: str, higher_is_better: bool, of_file: bool = False) -> int | None:
    """Index of the point where more compression begins to cost more than it saves; None below 3 points.

    Kneedle's rule (Satopaa et al. 2011): on axes scaled to [0, 1], logarithm of the recurrent parameters, or with
    `of_file` of the bytes, and loss of the metric, the point farthest below the straight line between the ends.
    """
    if len(points) < 3:
        return None
    size = [math.log(max(1, _size(p, of_file))) for p in points]
    cost = [-p.metrics[metric] if higher_is_better else p.metrics[metric] for p in points]
    if not all(map(math.isfinite, cost)):
        return None
    gain = [
        _scaled(max(size) - s, max(size) - min(size)) - _scaled(c - min(cost), max(cost) - min(cost))
        for s, c in zip(size, cost, strict=True)
    ]
    return max(range(len(points)), key=lambda i: gain[i])


def _size(point: Point, of_file: bool) -> int:
    return point.bytes if of_file else point.recurrent_parameters


def _scaled(value: float, span: float) -> float:
    return value / span if span else 0.0


def _file_name(budget: str) -> str:
    """A budget as part of a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in budget.replace("%", "pc"))
