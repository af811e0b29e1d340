"""Checks a converted file end to end: its bytes, its plan, its numbers, and that its layers compute what it says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from kruify.analysis.int8_arithmetic import exact_step
from kruify.analysis.layers import layers_of
from kruify.checkpoint import Checkpoint, read
from kruify.checkpoint.stored import encode
from kruify.conversion import dense_kru, densify, densify_tensors
from kruify.conversion.check import bounded_plan
from kruify.conversion.locate import EMBEDDING, RecurrentLayer
from kruify.conversion.plan import Plan
from kruify.conversion.storing import matrix_sizes
from kruify.errors import CorruptError, PlanError, TargetMissedError
from kruify.layers import KRU, int8
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase
from kruify.progress import Progress

# Largest difference from float64 that rounding explains, relative to the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
STEPS, BATCH = 16, 3
# Where a layer rounds its inputs and states to eight bits, too, one step of each layer and direction is compared with
# the same arithmetic. The whole layer is compared by the root mean square, in the first steps alone: over many steps a
# network of large weights carries any rounding away from the exact states.
INT8_TOLERANCE, INT8_WHOLE_TOLERANCE, INT8_STEPS = 1e-5, 1e-1, 2


@dataclass(frozen=True)
class Check:
    """One thing that was looked at and found in order."""

    name: str
    detail: str


def verify(
    path: str | PathLike[str],
    source: str | PathLike[str] | None = None,
    key: str | None = None,
    *,
    progress: Progress | None = None,
) -> list[Check]:
    """Opens, rebuilds and runs a converted file.

    Args:
        source: the dense checkpoint that it should come from.
        key: the nested entry of `source` that holds the state dict, where it has several.
        progress: told of the layers.

    Raises:
        CorruptError: the file is damaged, a tensor is missing, has another shape, or is not finite; it is not made from
            `source`.
        PlanError: kruify did not write the file.
        TargetMissedError: a layer does not compute what its factors say.
    """
    checkpoint = read(path)
    plan = bounded_plan(checkpoint)
    if not plan.layers:
        raise PlanError("its plan has no layers", path, "Verify a converted file")
    checksum = "checksum as written" if checkpoint.format == "safetensors" else "no checksum of kruify's"
    checks = [Check("file", f"{checkpoint.size:,} bytes, {checksum}, sha256 {checkpoint.sha256}")]
    dense = densify_tensors(checkpoint.tensors, plan)
    _check_form(checkpoint, plan)
    count = len(list(plan.matrices()))
    rebuilt = "1 matrix rebuilt from its factors" if count == 1 else f"{count} matrices rebuilt from their factors"
    checks.append(Check("plan", rebuilt))
    checks.append(_finite(checkpoint))
    checks += _layers(checkpoint, progress)
    if source is not None:
        checks.append(_source(checkpoint, dense, read(source, key=key)))
    return checks


def _check_form(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises `CorruptError` unless a file holds what is written for its tensors: dtypes, scales, compressed index."""
    if int(checkpoint.metadata["kruify.schema"]) < 4:  # other scales
        return
    wanted = encode(checkpoint.tensors, checkpoint.storage, matrix_sizes(plan))
    for name in {**wanted, **checkpoint.stored}:
        a, b = wanted.get(name), checkpoint.stored.get(name)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise CorruptError("it is not stored as its plan and its storage say", f"{checkpoint.path}: {name}")


def _finite(checkpoint: Checkpoint) -> Check:
    for name in checkpoint.nonfinite():
        raise CorruptError("it holds NaN or infinite numbers", f"{checkpoint.path}: {name}", "Train or convert again")
    numbers = sum(tensor.numel for tensor in checkpoint.tensors.lazy.values())
    return Check("numbers", f"{numbers:,} in {len(checkpoint.tensors)} tensors, all finite")


def _layers(checkpoint: Checkpoint, progress: Progress | None) -> list[Check]:
    """Runs every converted layer as it would run here, and torch's own dense layer in float64."""
    checks = list[Check]()
    layers = layers_of(checkpoint, beside=True)
    for (layer, _), module in zip(layers.items, layers.modules(), strict=True):
        if layer.name not in layers.planned:
            continue
        if progress is not None:
            progress(len(checks), len(layers.planned), f"running layers: {layer.name}")
        if isinstance(module, KRU):
            exact: nn.Module = dense_kru(module, torch.float64)
        else:
            exact = densify(copy.deepcopy(module).double()).double()
        x = _input(layer)
        with torch.no_grad():
            given = x.to(next(module.parameters()).dtype.to_real()) if x.is_floating_point() else x
            integers = _in_integers(module, given)
            if integers and not layer.cell:
                x, given = x[:INT8_STEPS], given[:INT8_STEPS]
            got, wanted = _run(module, given), _run(exact, x)
        size: Any = torch.linalg.norm if integers else torch.amax
        difference = float(size((got.double() - wanted).abs()) / size(wanted.abs()).clamp(min=1e-12))
        name = layer.name or type(module).__name__
        where = f"{checkpoint.path}: {name}"
        said = _within(difference, INT8_WHOLE_TOLERANCE if integers else TOLERANCES[got.dtype], "dense one", where)
        if integers:
            said += ", " + _within(_in_one_step(cast(Any, module)), INT8_TOLERANCE, "arithmetic of eight bits", where)
        checks.append(Check(f"layer {name}", said))
    return checks


def _within(difference: float, allowed: float, what: str, where: str) -> str:
    if not difference <= allowed:
        raise TargetMissedError(
            f"the layer differs by {difference:.1e} from the {what} in float64, allowed is {allowed:.0e}",
            where,
            "Report this as a bug",
        )
    return f"differs by {difference:.1e} from the {what} in float64"


@torch.no_grad()
def _in_one_step(module: KRUBase | KRUCellBase) -> float:
    """The largest difference of one step from the same arithmetic, relative to the largest number in a state, over all
    layers and directions."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for weights in module.weights_of_directions():
        features = cast(Any, weights["weight_ih"]).shape[1]
        x = torch.randn(BATCH, features, generator=generator)
        states = 2 if module.kind == "lstm" else 1
        state = tuple(torch.rand(states, BATCH, module.hidden_size, generator=generator) * 2 - 1)
        for got, wanted in zip(
            int8.step(module, weights, x, state), exact_step(module, weights, x, state), strict=True
        ):
            worst = max(worst, float((got - wanted).abs().amax() / wanted.abs().amax().clamp(min=1e-12)))
    return worst


def _in_integers(module: nn.Module, x: Tensor) -> bool:
    return isinstance(module, KRUBase | KRUCellBase) and int8.prepared(module, x) is not None


def _input(layer: RecurrentLayer) -> Tensor:
    """(steps, batch, input_size), (batch, input_size) for a cell or a linear layer, in float64; batch_first merely
    swaps the names. Of an embedding the numbers of all its rows."""
    if layer.kind == EMBEDDING:
        return torch.arange(layer.hidden_size)
    shape = (BATCH,) if layer.cell else (STEPS, BATCH)
    return torch.randn(*shape, layer.input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    outputs = cast(Any, module)(x)
    return cast(Tensor, outputs[0] if isinstance(outputs, tuple) else outputs)


def _source(checkpoint: Checkpoint, dense: dict[str, Tensor], source: Checkpoint) -> Check:
    if checkpoint.metadata.get("kruify.source_sha256") != source.sha256:
        raise CorruptError(f"it was not made from {source.path}: the sha256 differ", checkpoint.path)
    for name, tensor in source.tensors.lazy.items():
        if name not in dense or tuple(dense[name].shape) != tensor.shape:
            raise CorruptError(f"{name} of {source.path} is missing or has another shape", checkpoint.path)
    return Check("source", f"made from {source.path}; its {len(source.tensors)} tensors have their counterparts")
