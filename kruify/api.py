"""The Python interface: what `kruify.inspect`, `kruify.convert`, `kruify.save`, `kruify.load` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import overload

from torch import nn

from kruify.checkpoint import Checkpoint, LazyTensor, metadata_for, read, write_model
from kruify.conversion import (
    Conversion,
    build_dense,
    build_layer,
    convert_module,
    load_tensors,
    plan_of,
    swap,
)
from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import Located, RecurrentLayer, locate, locate_checkpoint
from kruify.conversion.plan import Plan, make_plan
from kruify.errors import CorruptError, PlanError, UsageError
from kruify.progress import Progress
from kruify.tasks.base import Task

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class Inspection:
    """What is inside a model: the recurrent layers, what was passed over and why, the size."""

    layers: list[RecurrentLayer]
    skipped: list[tuple[str, str]]
    parameters: int
    format: str
    plan: Plan | None = None  # of a file that kruify converted


def inspect(source: nn.Module | Path_, key: str | None = None) -> Inspection:
    """Looks into a module or a checkpoint without changing or running it.

    Args:
        key: the nested entry that holds the state dict, where a file has several.

    Raises:
        UsageError, UnsafeError, CorruptError, UnsupportedError: the file cannot be read; the text says why.
    """
    if isinstance(source, nn.Module):
        located = locate(source)
        plan = plan_of(source)
        parameters = sum(LazyTensor.of(p).reals for p in source.parameters())
        return Inspection(located.layers, located.skipped, parameters, "module", plan if plan.layers else None)
    return inspect_checkpoint(read(source, key=key))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """`inspect` for a checkpoint that is open already."""
    located = locate_checkpoint(checkpoint)
    parameters = sum(t.reals for name, t in checkpoint.tensors.lazy.items() if name not in checkpoint.ties)
    plan = stored_plan(checkpoint) if checkpoint.is_kruify else None
    return Inspection(located.layers, located.skipped, parameters, checkpoint.format, plan)


def stored_plan(checkpoint: Checkpoint) -> Plan:
    """The plan that a converted file carries.

    Raises:
        PlanError: the file was not written by kruify.
    """
    text = checkpoint.metadata.get("kruify.plan")
    if text is None:
        raise PlanError("the file carries no plan: kruify did not write it", checkpoint.path, "Convert it first")
    return Plan.from_json(text, f"plan in {checkpoint.path}")


def convert(
    model: nn.Module,
    factors: str = "auto",
    *,
    input_factors: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    plan: Plan | None = None,
    task: Task | None = None,
    subclasses: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Conversion]:
    """A copy of `model` with its recurrent matrices decomposed, and the account of it; `model` is untouched.

    Args:
        factors: spec of the recurrent matrices (kruify.factors); `plan` overrules all specs and patterns.
        input_factors: spec of the input matrices W_ih; None leaves them dense.
        only, skip, overrides: patterns, see `kruify.conversion.plan.make_plan`.
        subclasses: convert subclasses of torch's layers too, taking them for what they derive from.
        task: run the dense model on its calibration batches first, and fit what its activations make of the error.

    Raises:
        UsageError: the model has no recurrent layer, or a spec or pattern does not fit.
    """
    if plan is None:
        layers = found(locate(model, subclasses=subclasses), type(model).__name__)
        plan = make_plan(layers, factors, input_factors, only, skip, overrides)
    moments = None if task is None else calibrate(model, task, seed=seed)
    return convert_module(model, plan, moments=moments, seed=seed, progress=progress)


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


def save(model: nn.Module, path: Path_, *, source_sha256: str = "", seed: int = 0) -> None:
    """Writes a module with KRU layers, all or nothing: as safetensors, or for torch.load where `path` ends in .pt.

    Raises:
        UsageError: the module has no KRU layer, or the file cannot be written.
    """
    plan = plan_of(model)
    if not plan.layers:
        raise UsageError("the model has no KRU layer", type(model).__name__, "Convert it first with kruify.convert")
    metadata = metadata_for(plan.to_json(), source_sha256=source_sha256, seed=seed)
    write_model(path, model.state_dict(), metadata)


@overload
def load(path: Path_, into: nn.Module, key: str | None = None) -> nn.Module: ...
@overload
def load(path: Path_, into: None = None, key: str | None = None) -> dict[str, nn.Module]: ...
def load(path: Path_, into: nn.Module | None = None, key: str | None = None) -> nn.Module | dict[str, nn.Module]:
    """Loads a dense or a converted checkpoint into the user's own model, or its recurrent layers alone.

    Args:
        into: the dense model (its recurrent layers are swapped in place) or one that was converted the same way. None
            for a file whose code is lost.

    Returns:
        `into`; or a new KRU layer where `into` is itself a bare nn.LSTM, GRU or RNN. Without `into` the recurrent
        layers of the file by name, KRU layers and dense ones, ready to be called.

    Raises:
        PlanError, CorruptError: the file does not fit the model.
    """
    checkpoint = read(path, key=key)
    return load_layers(checkpoint) if into is None else load_checkpoint(checkpoint, into)


def load_layers(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The recurrent layers of a checkpoint by name. What a state dict cannot tell (batch_first) is torch's default."""
    converted = stored_plan(checkpoint).layers if checkpoint.is_kruify else []
    layers: dict[str, nn.Module] = {item.layer.name: build_layer(item) for item in converted}
    layers |= {layer.name: build_dense(layer) for layer in locate_checkpoint(checkpoint).layers}
    for name, module in layers.items():
        tensors = {f"{name}.{n}" if name else n: n for n in module.state_dict()}
        missing = sorted(set(tensors) - set(checkpoint.tensors))
        if missing:
            raise CorruptError(f"the tensor '{missing[0]}' is missing", checkpoint.path, "Convert the source again")
        load_tensors(module, {n: checkpoint.tensors[full] for full, n in tensors.items()}, checkpoint.path)
    return layers


def load_checkpoint(checkpoint: Checkpoint, into: nn.Module) -> nn.Module:
    """`load` for a checkpoint that is open already."""
    if checkpoint.is_kruify:
        into = swap(into, stored_plan(checkpoint))
    load_tensors(into, checkpoint.tensors, checkpoint.path)
    return into


def default_output(path: Path_) -> Path:
    """Where `convert` writes if it is not told: `model.pt` -> `model.kru.safetensors` beside it."""
    path = Path(path)
    return path.with_name(f"{path.name.partition('.')[0] or path.name}.kru.safetensors")
