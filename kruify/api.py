"""The Python interface: one function per command of the command line, for modules and files alike.

A network is an nn.Module, or a file that the task's network is loaded from; a task is a `Task` or the name that the
command line takes. `output` is a file to write, checked before the work begins. `key` is the entry of a file that
holds the state dict, where it has several. `kruify.convert` and `kruify.inspect` are in kruify.conversion,
`kruify.verify` is in kruify.analysis, `kruify.report` in kruify.reporting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from kruify.checkpoint import Checkpoint, atomic_file, carried, check_model_target, check_target, read
from kruify.conversion import build_dense, build_layer, load_tensors, plan_of, quantize
from kruify.conversion.check import dense_layers, stored_plan
from kruify.conversion.computed import state_of
from kruify.conversion.loading import load_into
from kruify.conversion.network import load_network, network_of
from kruify.conversion.pipeline import refuse_converted
from kruify.conversion.plan import Plan
from kruify.conversion.size import check_budget_target
from kruify.conversion.storing import check_storage, write_converted
from kruify.errors import CorruptError, UsageError
from kruify.exporting import Exported, export_dense, export_graph, export_layers, export_network
from kruify.layers.storage import mark, marks, within
from kruify.progress import Progress
from kruify.search.compression import Compression
from kruify.search.compression import compress as _compress
from kruify.search.trade_off import Sweep
from kruify.search.trade_off import sweep as _sweep
from kruify.tasks.base import Task, fresh_model
from kruify.tasks.evaluation import Evaluations
from kruify.tasks.loader import load_task
from kruify.training import FinetuneResult, Recipe
from kruify.training import finetune as _finetune
from kruify.training.batches import steps_per_epoch
from kruify.training.output import write_trained

FilePath = str | os.PathLike[str]
Network = nn.Module | Checkpoint | FilePath


@dataclass(frozen=True)
class Evaluation:
    """What a network achieves on a task.

    Attributes:
        metrics: name -> value, in the task's units.
        split: "train", "valid" or "test".
        examples: how many it was measured on, None where the task does not tell.
    """

    metrics: dict[str, float]
    split: str
    examples: int | None

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify evaluate --json` prints."""
        return asdict(self)


def evaluate(
    model: Network,
    task: Task | str,
    split: str = "test",
    *,
    key: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a network, dense or converted, on a task: `kruify.evaluate("model.pt", "task.py:Name").metrics`.

    Raises:
        CorruptError, PlanError: a file does not fit the task's network.
        TaskError: the task cannot be loaded or does not give its metric.
    """
    task = load_task(task)
    metrics = Evaluations(task, progress).measure(_network(_opened(model, key), task), split)
    return Evaluation(metrics, split, task.examples(split))


def finetune(
    model: Network,
    task: Task | str,
    *,
    teacher: Network | None = None,
    output: FilePath | None = None,
    key: str | None = None,
    conditioning: bool | FilePath = False,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    **options: Any,
) -> FinetuneResult:
    """Trains a network on a task and keeps the weights that validate best; a module is changed in place.

        kruify.finetune("small.kru.safetensors", "task.py:Name", teacher="model.pt", output="tuned.kru.safetensors")

    Args:
        teacher: the dense network to learn from, too.
        conditioning: measure the recurrent matrices at every validation; a path: draw the measures there, too (SVG).
        dtype, keep: how the weights are stored (`kruify.quantize`), of a copy of the module; None for as they are.
        options: further arguments of `kruify.training.finetune`, and options of the recipe: epochs, lr, ...

    Raises:
        UsageError: an option makes no sense, or a file cannot be read or written.
        TaskError: the task cannot be loaded, has no batches or does not give its metric.
    """
    student = _opened(model, key)
    # A converted file has one state dict, so the key is that of its teacher.
    known = None if isinstance(student, Checkpoint) and not student.is_kruify else key
    dense = None if teacher is None else _opened(teacher, known)
    _check_targets(output, conditioning, *_files(student), *_files(dense))
    check_storage(dtype, keep)
    task = load_task(task)
    recipe, options = _recipe(recipe or Recipe(), options)
    network = _network(student, task)
    if dtype is not None:
        network = quantize(network, dtype, keep)
    options["teacher"] = None if dense is None else _network(dense, task)
    result = _finetune(network, task, recipe=recipe, conditioning=conditioning is not False, **options)
    _write(result, recipe, output, conditioning, source=student if isinstance(student, Checkpoint) else None)
    return result


def train(
    task: Task | str,
    *,
    output: FilePath | None = None,
    conditioning: bool | FilePath = False,
    recipe: Recipe | None = None,
    steps: int | None = None,
    **options: Any,
) -> FinetuneResult:
    """Trains a task's network from scratch: `kruify.train("copy-memory:cell=kru,hidden=128", output="copy.pt").model`.

    Args:
        conditioning: as for `finetune`.
        recipe: None for `Recipe.from_scratch()`.
        steps: optimiser steps, instead of the recipe's epochs.
        options: as for `finetune`.

    Raises:
        UsageError, TaskError: as for `finetune`.
    """
    task = load_task(task)
    recipe, options = _recipe(recipe or Recipe.from_scratch(), options)
    if steps is not None:
        recipe = recipe.changed(epochs=steps / steps_per_epoch(task, recipe))
    _check_targets(output, conditioning)
    torch.manual_seed(recipe.seed)
    result = _finetune(fresh_model(task), task, recipe=recipe, conditioning=conditioning is not False, **options)
    _write(result, recipe, output, conditioning, network=network_of(task))
    return result


def compress(
    model: Network,
    task: Task | str,
    budget: str,
    *,
    output: FilePath | None = None,
    key: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Compression:
    """Plans, converts, fine-tunes and evaluates in one go; `model` is untouched.

        small = kruify.compress("model.pt", "task.py:Name", "16x", max_drop=0.01, output="small.kru.safetensors").model

    Args:
        options: further arguments of `kruify.search.compression.compress`: max_drop, attempts, options of the recipe.

    Raises:
        UsageError: no recurrent layer, a bad option, or a file that cannot be read or written.
        PlanError: the budget cannot be met.
    """
    task = load_task(task)
    dense = _opened(model, key, dense=True)
    if output is not None:
        check_model_target(output, *_files(dense))
        check_budget_target(budget, output)
    source = dense if isinstance(dense, Checkpoint) else None
    done = _compress(_network(dense, task), task, budget, source=source, seed=seed, **options)
    if output is not None:
        sha256, extra = ("", {}) if source is None else (source.sha256, carried(source))
        _save(done.model, output, seed, sha256, {**extra, **done.notes})
    return done


def sweep(
    model: Network,
    task: Task | str,
    budgets: Sequence[str] = ("2x", "4x", "8x", "16x"),
    folder: FilePath | None = None,
    *,
    key: str | None = None,
    **options: Any,
) -> Sweep:
    """Draws the trade-off curve of a network under several budgets; `model` is untouched.

    Args:
        folder: for networks and state, or an address (`kruify.search.trade_off.sweep`); None for `MODEL.sweep` beside a
            file.
        options: further arguments of `kruify.search.trade_off.sweep`: split, share, seed, and options of the recipe.

    Raises:
        UsageError: a bad budget or option, no recurrent layer, no folder for a module, or one that holds another sweep.
        PlanError: a budget cannot be met.
    """
    task = load_task(task)
    dense = _opened(model, key, dense=True)
    if folder is None and isinstance(dense, nn.Module):
        raise UsageError("the sweep of a module needs a folder", "sweep", "Name one for its networks")
    folder = folder or f"{_files(dense)[0]}.sweep"
    source = dense if isinstance(dense, Checkpoint) else None
    return _sweep(_network(dense, task), task, budgets, folder, source=source, **options)


def export(
    model: Network,
    to: Literal["c", "dense", "onnx", "torch"],
    output: FilePath,
    *,
    task: Task | str | None = None,
    original: FilePath | None = None,
    form: str = "folded",
    key: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Exported]:
    """Writes a network in a form that runs without kruify, runs what was written and compares it.

    Args:
        to: a dense state dict, ONNX, a torch.export program, or a C99 file with weights in eight bits.
        task: export its whole network, not layer by layer; a module needs one.
        original: the file that was converted, to write its kind again; with "onnx" its whole graph, small.
        form: of the recurrent nodes of that graph, as `convert` takes it.
        progress: told of the layers, where they are written or compared one by one.
        options: further arguments of `kruify.exporting`: dense, batch_first, nonlinearity, tolerance.

    Raises:
        UsageError, UnsupportedError: the network cannot be written so.
        TargetMissedError: the file differs from the network; it is deleted.
    """
    path = Path(output)
    source = _opened(model, key)
    check_target(path, *_files(source), *([] if original is None else [original]))
    if task is not None and to != "dense":
        if to == "c":
            raise UsageError("only recurrent layers are written in C", "export", "Leave the task out")
        task = load_task(task)
        return [export_network(_network(source, task), task, to, path, **options)]
    if form != "folded" and (to != "onnx" or original is None):
        raise UsageError("a form is of a whole ONNX graph", "export", "Give original, the graph that was converted")
    if isinstance(source, nn.Module):
        raise UsageError("a module is exported with its task", type(model).__name__, "Give task, or save it to a file")
    if to == "dense":
        return [export_dense(source, path, source=Path(original) if original else None, progress=progress, **options)]
    if original is not None:
        return [export_graph(source, path, Path(original), form)]
    return export_layers(source, to, path, progress=progress, **options)


def save(model: nn.Module, path: FilePath, *, source_sha256: str = "", seed: int = 0) -> None:
    """Writes a module with KRU layers, all or nothing: as safetensors, or for torch.load where `path` ends in .pt.

    Weights that `kruify.quantize` marked, or that a file held so, are written in that dtype.

    Raises:
        UsageError: the module has no KRU layer, or the file cannot be written.
    """
    _save(model, path, seed, source_sha256)


def _save(
    model: nn.Module, path: FilePath, seed: int, source_sha256: str = "", extra: Mapping[str, str] | None = None
) -> None:
    plan = plan_of(model)
    if not plan.layers:
        raise UsageError("the model has no KRU layer", type(model).__name__, "Convert it first with kruify.convert")
    write_converted(path, state_of(model), plan, marks(model), source_sha256=source_sha256, seed=seed, extra=extra)


@overload
def load(
    path: FilePath, into: nn.Module, key: str | None = None, rename: Mapping[str, str] | None = None
) -> nn.Module: ...
@overload
def load(
    path: FilePath, into: None = None, key: str | None = None, rename: Mapping[str, str] | None = None
) -> dict[str, nn.Module]: ...
def load(
    path: FilePath, into: nn.Module | None = None, key: str | None = None, rename: Mapping[str, str] | None = None
) -> nn.Module | dict[str, nn.Module]:
    """Loads a dense or a converted checkpoint into the user's own model, or its recurrent layers alone.

    Args:
        into: the dense model (the layers of the file's plan are swapped in place) or one that was converted the same
            way. None for a file whose code is lost.
        rename: name in the file, or what stands before a dot there -> name in the model; ONNX calls the layer `rnn`
            of a network `rnn.LSTM`.

    What an ONNX graph has beyond the model (initial states and other constants) is left out.

    Returns:
        `into`; or a new KRU layer where `into` is itself a bare nn.LSTM, GRU or RNN. Without `into` the recurrent
        layers of the file by name, KRU layers and dense ones, ready to be called; what a state dict cannot tell
        (batch_first) is torch's default.

    Raises:
        PlanError, CorruptError: the file does not fit the model.
        UsageError: without `into`, the file holds no recurrent layer.
    """
    checkpoint = read(path, key=key)
    if into is not None:
        return load_into(into, checkpoint, rename or {})
    plan = stored_plan(checkpoint) if checkpoint.is_kruify else Plan()
    layers: dict[str, nn.Module] = {item.layer.name: build_layer(item) for item in plan.layers}
    layers |= {layer.name: build_dense(layer) for layer in dense_layers(checkpoint, plan).layers}
    if not layers:
        hint = "Give your network as `into`: all its tensors are then loaded"
        raise UsageError("it holds no recurrent layer", checkpoint.path, hint)
    for name, module in layers.items():
        tensors = {f"{name}.{n}" if name else n: n for n in module.state_dict()}
        missing = sorted(set(tensors) - set(checkpoint.tensors))
        if missing:
            raise CorruptError(f"the tensor '{missing[0]}' is missing", checkpoint.path, "Convert the source again")
        load_tensors(module, {n: checkpoint.tensors[full] for full, n in tensors.items()}, checkpoint.path)
        mark(module, within(checkpoint.storage, name, module))
    return layers


def _opened(model: Network, key: str | None, *, dense: bool = False) -> nn.Module | Checkpoint:
    """The module or the open file; `dense` refuses what is converted already."""
    if isinstance(model, nn.Module):
        return model
    checkpoint = model if isinstance(model, Checkpoint) else read(model, key=key)
    if dense:
        refuse_converted(checkpoint)
    return checkpoint


def _check_targets(output: FilePath | None, conditioning: bool | FilePath, *inputs: Path) -> None:
    if output is not None:
        check_model_target(output, *inputs)
    if not isinstance(conditioning, bool):
        check_target(conditioning, *inputs, *([] if output is None else [output]))


def _recipe(recipe: Recipe, options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with those of the options that belong to it, and the others."""
    changes = {name: value for name, value in options.items() if name in recipe.to_json()}
    return recipe.changed(**changes), {name: value for name, value in options.items() if name not in changes}


def _write(
    result: FinetuneResult, recipe: Recipe, output: FilePath | None, conditioning: bool | FilePath, **made_from: Any
) -> None:
    """The network and the picture, where they were asked for; under torchrun one process writes."""
    if output is not None and result.is_main:
        write_trained(output, result, recipe, **made_from)
    if not isinstance(conditioning, bool) and result.is_main:
        from kruify.reporting.training import conditioning_svg  # with rich: half of what kruify adds to torch's start

        with atomic_file(conditioning) as file:
            file.write(conditioning_svg(result.to_json()["history"]).encode())


def _network(source: nn.Module | Checkpoint, task: Task) -> nn.Module:
    return source if isinstance(source, nn.Module) else load_network(source, task)


def _files(source: nn.Module | Checkpoint | None) -> tuple[Path, ...]:
    return source.files if isinstance(source, Checkpoint) else ()
