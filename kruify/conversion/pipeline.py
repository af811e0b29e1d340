"""The one way of a conversion: module or file -> plan -> converted network, and what it says of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from torch import nn

from kruify.checkpoint import Checkpoint, carried, check_model_target, check_target, read
from kruify.checkpoint.target import FOREIGN, TORCH
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.beside import layers_beside, linear_layers, stored_beside
from kruify.conversion.budget import make_budget_plan, parse_budget, slack_of
from kruify.conversion.calibration import Moments, calibrate
from kruify.conversion.check import check_plan
from kruify.conversion.computed import copied, state_of
from kruify.conversion.latency import timed_plans
from kruify.conversion.locate import AnyTensor, Located, RecurrentLayer, locate, locate_checkpoint
from kruify.conversion.modules import convert_module
from kruify.conversion.network import load_network
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.renaming import names_in
from kruify.conversion.result import ByteCounts, Conversion, expected
from kruify.conversion.sensitivity import plan_by_loss
from kruify.conversion.size import DTYPE, FileSize, GraphSize, check_budget_target, plan_size
from kruify.conversion.staying_dense import without_dense
from kruify.conversion.storing import (
    check_storage,
    in_float32,
    planned,
    rounded,
    storage_for,
    store_as,
    stored_bytes,
    weight_bytes,
    with_dense,
    write_converted,
)
from kruify.conversion.tensors import convert_tensors
from kruify.errors import UsageError
from kruify.graphs import GraphBytes, SmallGraph, check_form, compare_graphs, kept_constants, write_in_form
from kruify.progress import Progress
from kruify.tasks.base import Task
from kruify.tasks.loader import load_task

ENDINGS = {*TORCH, *FOREIGN, ".safetensors", ".index"}
FilePath = str | os.PathLike[str]


class Options(TypedDict, total=False):
    """The options of `convert`."""

    input_factors: str | None
    budget: str | None
    input_budget: str | None
    max_error: float | None
    only: Sequence[str]
    skip: Sequence[str]
    overrides: Mapping[str, str] | None
    plan: Plan | FilePath | None
    task: Task | str | None
    moments: Mapping[str, Moments] | None
    subclasses: bool
    dtype: str | None
    keep: Sequence[str]
    output: FilePath | None
    form: str
    dry_run: bool
    key: str | None
    seed: int
    progress: Progress | None


@overload
def convert(
    source: nn.Module, factors: str | None = None, **options: Unpack[Options]
) -> tuple[nn.Module, Conversion]: ...
@overload
def convert(source: Checkpoint | FilePath, factors: str | None = None, **options: Unpack[Options]) -> Conversion: ...
def convert(
    source: nn.Module | Checkpoint | FilePath,
    factors: str | None = None,
    *,
    input_factors: str | None = None,
    budget: str | None = None,
    input_budget: str | None = None,
    max_error: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    plan: Plan | FilePath | None = None,
    task: Task | str | None = None,
    moments: Mapping[str, Moments] | None = None,
    subclasses: bool = False,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    output: FilePath | None = None,
    form: str = "folded",
    dry_run: bool = False,
    key: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Conversion] | Conversion:
    """Puts sums of Kronecker products in place of recurrent matrices; `source` itself is untouched.

        small, conversion = kruify.convert(model, budget="16x")
        conversion = kruify.convert("model.pt", budget="16x", output="small.kru.safetensors")

    Args:
        factors: spec of the recurrent matrices (kruify.factors), "auto" where nothing else chooses them; "dense" leaves
            them, to be stored as `dtype`.
        input_factors: spec of the input matrices W_ih; None leaves them dense.
        budget: instead of specs, "10x", "params=25%" or "macs=10%" of all recurrent matrices (conversion.budget);
            "size=8x", "size=600kB" of the file of the whole network (conversion.size); or "latency=3x" of the time of
            its recurrent layers, measured here (conversion.latency).
        input_budget: the same for the input matrices, which a size and a latency cover already.
        max_error: bound on ||W - K|| / ||W|| of every gate; without a budget, the smallest structures that keep it.
        only, skip, overrides: patterns (conversion.plan.make_plan).
        plan: a plan or its JSON file, instead of all options above.
        task: a task or its name: the dense model runs on its calibration batches first, and the fit, and the rounding
            to four bits, minimise the error of what the matrices give on them. A size asks for its loss, if it has one.
        moments: what `kruify.conversion.calibration` finds of the matrices' inputs, by their names in `source`, instead
            of a task.
        subclasses: convert subclasses of torch's layers, too, taking them for what they derive from.
        dtype: how all weights are stored, as `kruify.quantize` says; None leaves them in the source's dtypes, under a
            size it is "int8".
        keep: globs of weights or modules that stay float32.
        output: file to write; None writes `model.kru.safetensors` beside `model.pt`, and nothing for a module. An
            .onnx file of an .onnx source is its whole graph with small weights (`graphs.write_small`).
        form: of the recurrent nodes of that graph: "folded" into dense weights when it is loaded, "scan" for their
            factors step by step, "auto" for whichever of these is faster in onnxruntime here (`graphs.write_in_form`).
        dry_run: choose the factors, count, and write nothing; with a budget or an error bound, which look for factors
            by fitting them, what they keep is told, too.
        key: the entry of a file that holds the state dict, where it has several.

    Returns:
        for a module the converted copy (the module itself in a dry run) and the `Conversion`; for a file the latter.

    Raises:
        UsageError: options that exclude each other, no recurrent layer, patterns that leave nothing to convert, or a
            file that cannot be read or written.
        PlanError, FactorSpecError, TargetMissedError: a plan, spec or budget does not fit.
        TaskError: the task cannot be loaded or does not run the recurrent layers.
    """
    by_budget = budget is not None or max_error is not None
    by_spec = factors is not None or input_factors is not None
    by_plan = plan is not None
    if by_plan and (by_spec or by_budget or input_budget is not None or only or skip or overrides):
        raise UsageError("a plan names all factors", hint="Leave all other options that choose factors out")
    if by_budget and by_spec:
        raise UsageError("a budget chooses the factors itself", hint="Give factors or a budget, not both")
    if input_budget is not None and not by_budget:
        raise UsageError("an input budget goes with a budget")
    limits = None if budget is None else parse_budget(budget)
    of_file = limits is not None and limits.of_file
    if limits is not None and limits.of_network and (input_budget is not None or max_error is not None):
        raise UsageError("a size or a latency covers all matrices and has no error bound", hint="Give --budget alone")
    if of_file:
        dtype = dtype or DTYPE
    to_graph = output is not None and Path(output).suffix.lower() == ".onnx"
    if not isinstance(source, nn.Module) and (to_graph or not isinstance(source, Checkpoint)):
        path = source.path if isinstance(source, Checkpoint) else source
        source = read(path, key=key, graph=to_graph)  # in its graph any recurrent node can stay
    graph = source.path if to_graph and isinstance(source, Checkpoint) and source.format == "onnx" else None
    check_storage(dtype, keep, graph is not None)
    check_form(form)
    if form != "folded" and graph is None:
        raise UsageError("a form is of an ONNX graph that is written as one", output, "Write MODEL.onnx to OUT.onnx")
    whole = None if graph is None else GraphBytes(graph, scan=form != "folded")
    if whole is not None and dtype is not None:
        keep = [*keep, *kept_constants(whole.copy.found)]
    tensors, located, where = _opened(source, subclasses)
    sha256, extra = ("", {}) if isinstance(source, nn.Module) else (source.sha256, carried(source))
    before = weight_bytes(as_lazy(tensors))
    if dtype is not None:
        tensors, located = in_float32(tensors), located.in_float32()
    if isinstance(source, Checkpoint):
        output = default_output(source.path) if output is None else output
    if output is not None and not dry_run:
        inputs = source.files if isinstance(source, Checkpoint) else ()
        (check_model_target if graph is None else check_target)(output, *inputs)
        if budget is not None:
            check_budget_target(budget, output)
    if task is not None or (limits is not None and limits.latency is not None):
        located = located.modules()
    layers = found(located, where)
    planner: Callable[..., Plan] = plan_size
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.read(plan)
    if task is not None and (by_budget or not dry_run):
        task = load_task(task)
        model = source if isinstance(source, nn.Module) else load_network(source, task)
        name_in = names_in(model, tensors)
        own = {name_in(name): name for name in tensors}
        found_beside = layers_beside(model, task, seed) if of_file and whole is None and task.has_loss else []
        found_beside = [
            replace(layer, name=own[weight].removesuffix(".weight"))
            for layer in found_beside
            if (weight := layer.full_name("weight")) in own
        ]
        located = located.with_beside(found_beside).in_float32() if found_beside else located
        layers = located.layers
        named = found_beside if plan is None else [item.layer for item in plan.beside]
        observed = {*(name_in(layer.name) for layer in named), *(linear_layers(model) if dtype == "int4" else ())}
        seen = calibrate(model, task, seed=seed, beside=observed, progress=progress)
        moments = {own[name]: found for name, found in seen.items() if name in own}
        if task.has_loss:
            planner = partial(plan_by_loss, dense=model, task=task)
    elif moments is not None and moments.keys().isdisjoint(
        layer.full_name(w) for layer in layers for w in layer.weights
    ):
        what = "the moments name none of its recurrent or input matrices"
        raise UsageError(what, where, "Name them as its state dict does")
    skip, overrides = without_dense(layers, tensors, only, skip, overrides)
    if whole is None:
        file = FileSize(tensors, layers, dtype or "float32", keep, seed, extra, sha256, before)
    else:
        file = GraphSize(tensors, layers, dtype or "float32", keep, before=whole.before, graph=whole)
    latency = None
    if plan is not None:
        located = located.with_beside(stored_beside(tensors, item.layer) for item in plan.beside)
        check_plan(plan, located)
    elif of_file:
        plan = planner(file, str(budget), only=only, skip=skip, overrides=overrides, moments=moments, progress=progress)
    elif limits is not None and limits.latency is not None:
        latency = timed_plans(
            file, str(budget), only=only, skip=skip, overrides=overrides, moments=moments, progress=progress
        ).checked(str(budget))
        plan = latency.chosen.plan
    elif by_budget:
        plan = make_budget_plan(
            tensors, layers, budget, input_budget=input_budget, max_error=max_error, only=only, skip=skip,
            overrides=overrides, moments=moments, seed=seed, progress=progress,
        )  # fmt: skip
    else:
        plan = make_plan(layers, "auto" if factors is None else factors, input_factors, only, skip, overrides)
    if dtype is not None:
        plan = with_dense(plan, layers)
    if not plan.layers and by_plan:
        what = "the plan names no recurrent layer, and one without factors is converted only with a dtype"
        raise UsageError(what, where, "Give --dtype float32 or a smaller one, or a plan with recurrent layers")
    if not plan.layers:
        raise UsageError("nothing is left to convert", where, "Give --only, --skip and --set other patterns")
    future = planned(tensors, plan)
    storage = storage_for(future, plan, dtype, keep)
    beside = source.size - before if isinstance(source, Checkpoint) else 0
    counts = ByteCounts(before, stored_bytes(future, plan, storage), max(0, beside))
    if graph is not None or of_file:
        size = file.of(plan)
        counts = replace(counts, file=size) if graph is None else ByteCounts(file.before, size, file=size)
    if of_file:
        counts = replace(counts, allowed=file.limit(str(budget)))
    slack = [*slack_of(plan, budget), *slack_of(plan, input_budget, "weight_ih")]
    told: dict[str, Any] = {"bytes": counts, "storage": storage, "latency": latency, "slack": slack}
    if dry_run and not by_budget:
        conversion = replace(expected(tensors, plan, located), **told)
        return (source, conversion) if isinstance(source, nn.Module) else conversion
    fit: dict[str, Any] = {"moments": moments, "storage": storage, "seed": seed, "progress": progress}
    converted = source
    if isinstance(source, nn.Module):
        dense = source if dtype is None else copied(source).float()
        converted, conversion = convert_module(dense, plan, **fit)
        converted = store_as(converted, storage) if storage else converted
    else:
        conversion = convert_tensors(tensors, plan, located, **fit)
    if dry_run:
        conversion = replace(conversion, tensors={}, **told)
        return (source, conversion) if isinstance(source, nn.Module) else conversion
    kept = rounded(conversion.tensors, plan, storage) if storage else conversion.tensors
    conversion = replace(conversion, tensors={**kept}, **told)
    if output is not None:
        conversion = replace(conversion, output=Path(output))
        if graph is not None:
            small = SmallGraph(graph, conversion.tensors, plan.structures(), storage)
            written, forms = write_in_form(small, output, form)
            size = written.bytes_after
            counts = replace(counts, before=written.bytes_before, after=size, file=size)
            return replace(conversion, bytes=counts, graph=compare_graphs(graph, written.path), forms=forms)
        write_converted(
            output, conversion.tensors, plan, storage, source_sha256=sha256, seed=seed, extra=extra, progress=progress
        )
    return (converted, conversion) if isinstance(converted, nn.Module) else conversion


def _opened(source: nn.Module | Checkpoint, subclasses: bool) -> tuple[Mapping[str, AnyTensor], Located, object]:
    """Tensors, recurrent layers, and a name for errors."""
    if isinstance(source, nn.Module):
        return state_of(source), locate(source, subclasses=subclasses), type(source).__name__
    refuse_converted(source)
    return source.tensors.lazy, locate_checkpoint(source, subclasses=subclasses), source.path


def found(located: Located, where: object) -> list[RecurrentLayer]:
    """The layers, or a `UsageError` that says that there are none and what was passed over."""
    if located.layers:
        return located.layers
    passed = "; ".join(f"{name}: {reason}" for name, reason in located.skipped[:3])
    raise UsageError(
        "there is no RNN, LSTM or GRU layer to convert" + (f" ({passed})" if passed else ""),
        where,
        "Look inside with 'kruify inspect'",
    )


def refuse_converted(checkpoint: Checkpoint) -> None:
    """Raises `UsageError` for a file that kruify has converted, where a dense one is asked for."""
    if checkpoint.is_kruify:
        raise UsageError("it is converted already", checkpoint.path, "Name the dense checkpoint that it was made from")


def default_output(path: FilePath) -> Path:
    """Where `convert` writes if it is not told: `model.pt` -> `model.kru.safetensors` beside it."""
    path = Path(path)
    stem = Path(path.name)
    while stem.suffix.lower() in ENDINGS:  # model.safetensors.index.json; what follows another dot belongs to the name
        stem = stem.with_suffix("")
    return path.with_name(f"{stem.name}.kru.safetensors")
