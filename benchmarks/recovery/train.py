"""One run: builds the network, trains it, measures it, returns the row that is recorded."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from files import file_of, largest_entries, single_entries, smaller_hidden
from grid import CONVERGED, INT8, METHODS, PER_GATE, TASKS, Run
from measurements import Row, where_and_when
from torch import nn

from kruify import convert, quantize, save
from kruify.analysis.contender import int8_network
from kruify.conversion import plan_of, swap
from kruify.conversion.locate import RecurrentLayer, locate
from kruify.conversion.plan import Plan, make_plan
from kruify.layers.matrix import KroneckerMatrix
from kruify.progress import Progress
from kruify.search.candidate_search import CandidateSearch
from kruify.search.candidates import Candidate, Choice
from kruify.tasks.base import Task
from kruify.tasks.loader import load_task
from kruify.training import finetune
from kruify.training.recurrent import recurrent_layers

CACHE = Path.home() / ".cache" / "kruify-recovery"  # weights and states, unless run.py is told another


def train(
    run: Run,
    cache: Path,
    progress: Progress | None = None,
    known: Callable[[Run], Row | None] = lambda run: None,
) -> Row:
    """Train and measure one network; an interrupted run continues where it stood.

    Args:
        cache: folder for weights and states; not for git, everything in it can be made again.
        known: the recorded row of another run if there is one. Where the candidate that is chosen has been trained
            as a run of its own, with the same options and seed, it is that run.
    """
    setup, method = TASKS[run.task], METHODS[run.method]
    task = load_task(setup.name)
    teacher = None if method.start in ("scratch", "smaller") else dense_network(run, task, cache)
    started = time.monotonic()
    row: Row = {}
    options = run.options
    if method.start == "candidates":
        assert teacher is not None
        chosen, row = choose_candidate(run, task, teacher, cache / run.key)
        twin = replace(run, method=PER_GATE)
        same = known(twin)
        options |= {"lr": chosen.lr}
        planned = specified(twin, teacher, task)
        if same and chosen.plan == planned and not chosen.moments and same["options"] == options:
            return {**same, **row, "run": run.key, "method": run.method, "same_run_as": twin.key}
        options.pop("share", None)
        options = {**options, "epochs": row.pop("epochs")}
        model = convert(teacher, plan=chosen.plan, moments=chosen.moments, dtype=chosen.dtype, seed=run.seed)[0]
    else:
        model, task = build(run, task, teacher)
        if method.file_plan is not None or method.start == "int8-own":  # which the trained weights decided
            row["plan"] = plan_of(model).to_json()
    untrained = method.start.startswith("int8") or (setup.published and method.start == "scratch")
    if untrained:
        row["valid"] = task.evaluate(model, "valid")
    else:
        result = finetune(
            model,
            task,
            teacher=teacher if method.teacher else None,
            resume=cache / run.key,
            device="cpu",
            evaluate_first=method.start == "candidates",  # as in compress
            progress=progress,
            **options,
        )
        row |= {"valid": result.metrics, "train_loss": result.history[-1].loss, "best_epoch": result.best_epoch}
        row["train_seconds"] = round(result.seconds, 1)
        torch.save(model.state_dict(), weights_file(run, cache))
        (cache / run.key / "state.pt").unlink(missing_ok=True)
    if teacher is not None and run in INT8:
        row["dense"] = {split: task.evaluate(teacher, split) for split in ("valid", "test")}
    if method.dense == CONVERGED and method.start in ("scratch", "dense"):
        row["int8"] = dict(zip(("test", "bytes"), int8_network(model, task, "test")[:2], strict=True))
    if (method.of_file or "int8" in row) and not method.dtype:
        rounded = quantize(model, "int8")
        row["rounded"] = {split: task.evaluate(rounded, split) for split in ("valid", "test")}
        row["rounded"]["bytes"] = file_bytes(rounded)
    return {
        "run": run.key,
        "task": run.task,
        "method": run.method,
        "times": run.times,
        "whole": run.whole,
        "seed": run.seed,
        "options": run.options,
        "specs": sorted({str(s) for m in model.modules() if isinstance(m, KroneckerMatrix) for s in m.structures}),
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        **row,
        "test": task.evaluate(model, "test"),
        "seconds": round(time.monotonic() - started, 1),
        "bytes": file_bytes(model) - (single_entries(plan_of(model)) if method.file_plan is largest_entries else 0),
        **counts(teacher if teacher is not None and method.start == "int8" else model),
        **where_and_when(),
    }


def dense_network(run: Run, task: Task, cache: Path) -> nn.Module:
    """The trained dense network of a run, published or kept in `cache`."""
    dense = task.model()
    published = TASKS[run.task].published
    dense.load_state_dict(
        task.published() if published else torch.load(weights_file(run.teacher, cache), weights_only=True)
    )
    return dense


def choose_candidate(run: Run, task: Task, teacher: nn.Module, folder: Path) -> tuple[Candidate, Row]:
    """What `kruify compress` would train, and what it was chosen on; kept in `folder` for the next time."""
    file = folder / "candidates.json"
    search = CandidateSearch(teacher, task, device="cpu", **run.options)
    if not file.exists():
        found = search.candidates(budget_of(run))
        epochs = run.options["epochs"]
        if METHODS[run.method].of_file:  # the trials and the training after them are one budget
            epochs /= 1 + search.share * search.trials(found)
            search = CandidateSearch(teacher, task, device="cpu", **{**run.options, "epochs": epochs})
        choice = search.choose(found, folder)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**choice.to_json(), "epochs": epochs}))
    kept = json.loads(file.read_text())
    return Choice.from_json(kept, search.moments).candidate, kept


def build(run: Run, task: Task, teacher: nn.Module | None) -> tuple[nn.Module, Task]:
    """The network of a run before training, and the task that it is trained on."""
    setup, method = TASKS[run.task], METHODS[run.method]
    torch.manual_seed(run.seed)
    if method.start == "scratch":
        model = task.model()
        if setup.published:
            model.load_state_dict(task.published())
        return model, task
    if method.start == "smaller":
        hidden = round(setup.hidden / run.times**0.5)
        if method.of_file:
            limit = file_of(task.model()).limit(budget_of(run))
            hidden = smaller_hidden(lambda h: load_task(setup.smaller(h)).model(), limit)
        task = load_task(setup.smaller(hidden))
        torch.manual_seed(run.seed)
        return (quantize(task.model(), method.dtype) if method.dtype else task.model()), task
    assert teacher is not None
    if method.start == "int8":
        return torch.ao.quantization.quantize_dynamic(teacher, {nn.GRU, nn.LSTM, nn.RNN, nn.Linear}), task
    if method.start == "int8-own":
        return convert(teacher, "dense", dtype=method.dtype or "int8", task=task)[0], task
    if method.start == "dense":
        model = task.model()
        model.load_state_dict(teacher.state_dict())
        return model, task
    plan = specified(run, teacher, task)
    if method.start == "random":
        return swap(task.model(), plan), task
    return convert(teacher, plan=plan, seed=run.seed, dtype=method.dtype)[0], task


def specified(run: Run, dense: nn.Module, task: Task) -> Plan:
    """The structure of every matrix that the run's method and budget ask for."""
    method = METHODS[run.method]
    if method.file_plan is not None:
        return method.file_plan(dense, task, budget_of(run))
    spec = method.spec
    assert spec is not None

    def wanted(layer: RecurrentLayer, weight: str) -> str:
        rows, cols = layer.shape(weight)
        return f"stacked:{spec(len(layer.gates) * rows, cols, times)}" if method.stacked else spec(rows, cols, times)

    layers, times = locate(dense).layers, matrix_times(run, dense)
    weights = [("weight_hh", True), ("weight_ih", run.whole)]
    specs = {
        layer.full_name(weight + suffix): wanted(layer, weight + suffix)
        for layer in layers
        for suffix in layer.suffixes
        for weight, factored in weights
        if factored
    }
    return make_plan(layers, "auto", None, (), (), specs)


def budget_of(run: Run) -> str:
    return f"size={run.times:g}x" if METHODS[run.method].of_file else f"params={100 / run.times:.8f}%"


def matrix_times(run: Run, dense: nn.Module) -> float:
    """How many times smaller each factored matrix becomes, so that the run keeps its word."""
    if not run.whole:
        return run.times
    total = sum(p.numel() for p in dense.parameters())
    factored = sum(
        p.numel()
        for layer in recurrent_layers(dense).values()
        for name, p in layer.named_parameters()
        if "weight_hh" in name or "weight_ih" in name
    )
    return factored / max(1.0, total / run.times - (total - factored))


def weights_file(run: Run, cache: Path) -> Path:
    return cache / f"{run.key}.pt"


def file_bytes(model: nn.Module) -> int:
    """Of the file that holds the network: kruify's where a part of it is kruify's, else what torch.save writes."""
    buffer = io.BytesIO()
    if plan_of(model).layers:
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model.safetensors")
            return (Path(folder) / "model.safetensors").stat().st_size
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def counts(model: nn.Module) -> dict[str, int]:
    """Parameters, recurrent and in all, and multiply-adds of the recurrent matrices per step."""
    recurrent = multiply_adds = 0
    for layer in recurrent_layers(model).values():
        for name, parameter in layer.named_parameters():
            if "weight_hh" in name:
                recurrent += parameter.numel()
        for name, matrix in layer.named_modules():
            if isinstance(matrix, KroneckerMatrix) and name.startswith("weight_hh"):
                multiply_adds += sum(s.multiply_adds for s in matrix.structures)
        multiply_adds += sum(p.numel() for n, p in layer.named_parameters(recurse=False) if n.startswith("weight_hh"))
    return {
        "recurrent_parameters": recurrent,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recurrent_multiply_adds": multiply_adds,
    }
