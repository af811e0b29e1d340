"""Runs one cell: builds the network, trains it, measures it, returns the entry of the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alternation import alternate
from gradual import START, finetune_gradually
from grid import BY_GATE, METHODS, TASKS, Cell
from ledger import where_and_when
from timing import best_times
from torch import nn

from kruify.api import convert
from kruify.calibrate import calibrate
from kruify.convert import convert_module, swap
from kruify.finetune import Progress, finetune
from kruify.finetune.recurrent import recurrent_layers
from kruify.layers.matrix import KroneckerMatrix
from kruify.locate import RecurrentLayer, locate
from kruify.plan import Plan, make_plan
from kruify.task import Task, load_task
from kruify.trial import Candidate, candidates, choose, from_json, to_json


def run(
    cell: Cell,
    cache: Path,
    on_progress: Callable[[Progress], None] | None = None,
    known: Callable[[Cell], dict[str, Any] | None] = lambda cell: None,
) -> dict[str, Any]:
    """Train and measure one cell; an interrupted one continues where it stood.

    Args:
        known: the entry of another cell if there is one. Where a trial chooses what has been trained gate by gate, with
            the same options and seed, it is that run.
        cache: folder for weights and states of runs; not for git, everything in it can be made again.
    """
    setup, method = TASKS[cell.task], METHODS[cell.method]
    task = load_task(setup.name)
    teacher = None
    if method.start not in ("scratch", "smaller"):
        teacher = task.model()
        teacher.load_state_dict(
            torch.load(weights_file(Cell(cell.task, "dense", 1, cell.seed), cache), weights_only=True)
        )
    started = time.monotonic()
    entry: dict[str, Any] = {}
    options = cell.options
    if method.start == "alternate":
        assert teacher is not None
        teacher, entry["alternation"] = alternate(teacher, task, plan_of(cell, teacher), options, on_progress)
        options |= {"epochs": options["epochs"] / 2}
    if method.tried:
        assert teacher is not None
        chosen, kept = tried(cell, task, teacher, cache / cell.key, on_progress)
        entry |= kept
        twin = replace(cell, method=BY_GATE)
        same = known(twin)
        if same and chosen.plan == plan_of(twin, teacher) and not chosen.moments and same["options"] == cell.options:
            return {**same, **entry, "cell": cell.key, "method": cell.method, "same_run_as": twin.key}
        model = convert_module(teacher, chosen.plan, moments=chosen.moments, seed=cell.seed)[0]
    else:
        begun = replace(cell, times=cell.times / START) if method.start == "gradual" else cell
        model, task = build(begun, task, teacher)
    if method.start == "int8":
        entry["valid"] = task.evaluate(model, "valid")
    else:
        taught_by = teacher if method.teacher else None
        if method.start == "gradual":
            assert teacher is not None
            result = finetune_gradually(model, plan_of(cell, teacher), task, taught_by, options, on_progress)
        else:
            result = finetune(
                model,
                task,
                teacher=taught_by,
                resume=cache / cell.key,
                device="cpu",
                evaluate_first=False,
                on_progress=on_progress,
                **options,
            )
        entry |= {"valid": result.metrics, "history": result.history, "train_seconds": round(result.seconds, 1)}
        torch.save(model.state_dict(), weights_file(cell, cache))
        (cache / cell.key / "state.pt").unlink(missing_ok=True)
    entry["test"] = task.evaluate(model, "test")
    return {
        "cell": cell.key,
        "task": cell.task,
        "method": cell.method,
        "times": cell.times,
        "seed": cell.seed,
        "whole": cell.whole,
        "specs": sorted({str(s) for m in model.modules() if isinstance(m, KroneckerMatrix) for s in m.structures}),
        "options": cell.options,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        **entry,
        **counts(teacher if teacher is not None and method.start == "int8" else model),
        "seconds": round(time.monotonic() - started, 1),
        **where_and_when(),
    }


def tried(
    cell: Cell, task: Task, teacher: nn.Module, folder: Path, on_progress: Callable[[Progress], None] | None
) -> tuple[Candidate, dict[str, Any]]:
    """What `kruify compress` would train, and what it was chosen on; kept in `folder` for the next time."""
    moments, file = calibrate(teacher, task, seed=cell.seed), folder / "trials.json"
    if not file.exists():
        layers, budget = locate(teacher).layers, f"params={100 / cell.times:.8f}%"
        found = candidates(teacher.state_dict(), layers, budget, moments=moments, seed=cell.seed)
        chosen, trials = choose(
            teacher, task, found, device="cpu", on_progress=on_progress, resume=folder, **cell.options
        )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(to_json(chosen, trials)))
    kept = json.loads(file.read_text())
    return from_json(kept, moments)[0], kept


def build(cell: Cell, task: Task, teacher: nn.Module | None) -> tuple[nn.Module, Task]:
    """A network of the size of a cell's, before training, and the task that it is trained on."""
    setup, method = TASKS[cell.task], METHODS[cell.method]
    torch.manual_seed(cell.seed)
    if method.start == "scratch":
        return task.model(), task
    if method.start == "smaller":
        task = load_task(setup.smaller(round(setup.hidden / cell.times**0.5)))
        return task.model(), task
    assert teacher is not None
    if method.start == "int8":
        return torch.ao.quantization.quantize_dynamic(teacher, {nn.GRU, nn.LSTM, nn.RNN, nn.Linear}), task
    if method.start == "dense":
        model = task.model()
        model.load_state_dict(teacher.state_dict())
        return model, task
    plan = plan_of(cell, teacher)
    if method.start == "random":
        return swap(task.model(), plan), task
    return convert(teacher, plan=plan, seed=cell.seed)[0], task


def plan_of(cell: Cell, dense: nn.Module) -> Plan:
    """The structure of every matrix that the cell's method and budget ask for."""
    method = METHODS[cell.method]
    spec = method.spec
    assert spec is not None

    def wanted(layer: RecurrentLayer, weight: str) -> str:
        rows, cols = layer.shape(weight)
        return f"stacked:{spec(len(layer.gates) * rows, cols, times)}" if method.stacked else spec(rows, cols, times)

    layers, times = locate(dense).layers, matrix_times(cell, dense)
    weights = [("weight_hh", True), ("weight_ih", cell.whole)]
    specs = {
        layer.full_name(weight + suffix): wanted(layer, weight + suffix)
        for layer in layers
        for suffix in layer.suffixes
        for weight, factored in weights
        if factored
    }
    return make_plan(layers, "auto", None, (), (), specs)


def matrix_times(cell: Cell, dense: nn.Module) -> float:
    """How many times smaller each factored matrix becomes, so that the cell keeps its word."""
    if not cell.whole:
        return cell.times
    total = sum(p.numel() for p in dense.parameters())
    factored = sum(
        p.numel()
        for layer in recurrent_layers(dense).values()
        for name, p in layer.named_parameters()
        if "weight_hh" in name or "weight_ih" in name
    )
    return factored / max(1.0, total / cell.times - (total - factored))


def weights_file(cell: Cell, cache: Path) -> Path:
    return cache / f"{cell.key}.pt"


def counts(model: nn.Module) -> dict[str, int]:
    """Parameters, recurrent and in all, and multiply-adds of the recurrent matrices a step."""
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


@torch.no_grad()
def latency(model: nn.Module, batch: int, steps: int = 32, seconds: float = 0.15) -> float:
    """Milliseconds a time step of all recurrent layers together, one thread, `steps` steps a call, the best of many."""
    total = 0.0
    for layer in recurrent_layers(model).values():
        x = torch.randn(steps, batch, layer.input_size)
        if layer.batch_first:
            x = x.transpose(0, 1).contiguous()
        layer.eval()
        total += best_times({"layer": partial(layer, x)}, seconds)["layer"] / steps
    return total
