"""Whether plan, tensors and model fit each other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kruify.checkpoint import Checkpoint, LazyTensor, limits
from kruify.conversion.computed import as_sources
from kruify.conversion.locate import DTYPES, KRU_KINDS, MATRIX, AnyTensor, Located, RecurrentLayer, locate_checkpoint
from kruify.conversion.plan import LayerPlan, Plan, Structures
from kruify.errors import CorruptError, FactorSpecError, KruifyError, PlanError, UnsafeError, UnsupportedError
from kruify.layers.matrix import group_terms

AGAIN = "Convert the source again"
_OWN = re.compile(r"(weight_(ih|hh|hr)|bias_(ih|hh))(_l\d+)?(_reverse)?")  # tensors that a recurrent layer has


def check_plan(plan: Plan, located: Located) -> None:
    """Raises `PlanError` unless every layer of the plan is there and has the sizes that the plan was made for."""
    found = {layer.name: layer for layer in located.layers}
    for item in plan.items:
        layer, actual = item.layer, found.get(item.layer.name)
        if actual is None:
            raise PlanError(f"the plan names layer '{layer.name}', which the model does not have: {sorted(found)}")
        if (actual.kind, actual.cell) != (layer.kind, layer.cell):
            raise PlanError(f"the plan's {layer.kind} '{layer.name}' does not fit the {actual.kind} in the model")
    for layer, weight, structures in plan.matrices():
        actual = found[layer.name]
        if weight not in actual.weights:
            raise PlanError(f"the plan's '{layer.full_name(weight)}' does not fit the {actual.kind} in the model")
        rows, cols = structures[0].rows // structures[0].gates, structures[0].cols
        if (rows, cols) != actual.shape(weight):
            have = "x".join(map(str, actual.shape(weight)))
            raise PlanError(
                f"the plan is made for {rows}x{cols} gates, the model has {have}",
                layer.full_name(weight),
            )


def stored_plan(checkpoint: Checkpoint) -> Plan:
    """The plan that a converted file carries, compared with the file's tensors before anything is built from it.

    Raises:
        PlanError: the file was not written by kruify.
        CorruptError: its plan is damaged, or does not fit its tensors.
    """
    text = checkpoint.metadata.get("kruify.plan")
    if text is None or not checkpoint.is_kruify:
        raise PlanError("the file carries no plan: kruify did not write it", checkpoint.path, "Convert it first")
    try:
        plan = Plan.from_json(text, f"plan in {checkpoint.path}")
    except (PlanError, FactorSpecError) as error:
        raise CorruptError(error.what, error.where or f"plan in {checkpoint.path}", AGAIN) from None
    if any(item.layer.kind == MATRIX for item in plan.layers):
        raise CorruptError("its plan has a matrix that no layer has", checkpoint.path, AGAIN)
    for layer, weight, structures in plan.matrices():
        _check_stored(checkpoint, layer, weight, structures)
    for item in plan.layers:
        _check_rest(checkpoint, item)
    return plan


def dense_layers(checkpoint: Checkpoint, plan: Plan) -> Located:
    """The recurrent layers of a checkpoint that its plan does not name: torch.nn's."""
    located, planned = locate_checkpoint(checkpoint), {item.layer.name for item in plan.layers}
    return Located([layer for layer in located.layers if layer.name not in planned], located.skipped)


def bounded_plan(checkpoint: Checkpoint) -> Plan:
    """`stored_plan` for what makes its matrices dense: a few small factors may stand for any size.

    Raises:
        UnsafeError: the dense matrices take far more than the file.
    """
    plan = stored_plan(checkpoint)
    numbers = sum(structure.dense_parameters for _, _, structures in plan.matrices() for structure in structures)
    size = numbers * max((tensor.dtype.itemsize for tensor in checkpoint.tensors.lazy.values()), default=0)
    if size > limits.RATIO * checkpoint.size + limits.DENSE:
        raise UnsafeError(f"its dense matrices take {size} bytes, far more than it holds", checkpoint.path)
    return plan


def stored_shapes(structures: Structures) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the entries that stand for one matrix, as docs/file-format.md lists them."""
    shapes: dict[str, tuple[int, ...]] = {}
    stacked = structures[0].gates
    rows, cols = structures[0].rows // stacked, structures[0].cols
    for t, ((term, scaled, _), gates) in enumerate(group_terms(structures).items()):
        count = max(stacked, len(gates))
        for f, (p, q) in enumerate(term.factors):
            sizes = (count, term.rank, p // stacked, q) if f == 0 else (1 if stacked > 1 else count, term.rank, p, q)
            shapes[f"terms.{t}.factors.{f}"] = sizes
        if scaled:
            shapes[f"terms.{t}.scale"] = (count, term.rank)
    if diagonals := sum(s.diagonal for s in structures):
        shapes["diagonal"] = (diagonals, min(rows, cols))
    if blocks := sum(s.sparse_blocks for s in structures):
        height = max(s.block for s in structures if s.sparse_blocks)
        shapes |= {"overlay.values": (blocks, height), "overlay.index": (blocks, 2)}
    return shapes


def _check_stored(checkpoint: Checkpoint, layer: RecurrentLayer, weight: str, structures: Structures) -> None:
    name, tensors = layer.full_name(weight), checkpoint.tensors.lazy
    found = {n.removeprefix(f"{name}."): tensor for n, tensor in tensors.items() if n.startswith(f"{name}.")}
    wanted = stored_shapes(structures)
    what = _difference(wanted, found)[0]
    if name in tensors:
        what = "the dense matrix stands beside its factors"
    index = found.get("overlay.index")
    if not what and index is not None and index.dtype != torch.int32:
        what = f"its index is {index.dtype}, not int32"
    kinds = {tensor.dtype for n, tensor in found.items() if n != "overlay.index"}
    if not what and (len(kinds) > 1 or not kinds <= set(DTYPES.values())):
        what = "its factors are of several dtypes, or of one that no layer computes in"
    if not what and any(dtype.is_complex for dtype in kinds) and layer.kind not in KRU_KINDS:
        what = "its factors are complex"
    if not what and index is not None:
        rows, cols = structures[0].rows // structures[0].gates, structures[0].cols
        what = _misplaced(index.load(), wanted["overlay.values"][1], rows, len(layer.gates), cols)
    if what:
        raise CorruptError(f"its tensors do not fit its plan: {what}", f"{checkpoint.path}: {name}", AGAIN)


def _misplaced(index: Tensor, height: int, rows: int, gates: int, cols: int) -> str:
    """What is wrong with the places of the blocks of a sparse residual, "" if nothing is."""
    row, col = index.long().unbind(1)
    if bool((row < 0).any() or (row >= rows * gates).any() or (col < 0).any() or (col >= cols).any()):
        return "a block of the sparse residual stands outside of the matrix"
    if bool((row // rows != (row + height - 1) // rows).any()):
        return "a block of the sparse residual reaches into another gate"
    if bool(((row * cols + col).diff() <= 0).any()):
        return "the blocks of the sparse residual are not in ascending order"
    return ""


def _check_rest(checkpoint: Checkpoint, item: LayerPlan) -> None:
    """The dense tensors of a layer: all there, of the right shapes, and no others."""
    layer, wanted = item.layer, dict[str, tuple[int, ...]]()
    if layer.kind in KRU_KINDS:
        return
    for suffix in layer.suffixes:
        for weight in (f"weight_ih{suffix}", f"weight_hh{suffix}"):
            rows, cols = layer.shape(weight)
            if weight not in item.matrices:
                wanted[weight] = (rows * len(layer.gates), cols)
            if layer.bias:
                wanted[weight.replace("weight", "bias")] = (rows * len(layer.gates),)
        if layer.proj_size:
            wanted[f"weight_hr{suffix}"] = (layer.proj_size, layer.hidden_size)
    prefix = f"{layer.name}." if layer.name else ""
    found = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.lazy.items() if n.startswith(prefix)}
    found = {n: t for n, t in found.items() if _OWN.fullmatch(n) and n not in item.matrices}
    if what := _difference(wanted, found)[0]:
        raise CorruptError(f"its tensors do not fit its plan: {what}", f"{checkpoint.path}: {layer.name}", AGAIN)


def load_tensors(model: nn.Module, tensors: Mapping[str, AnyTensor], where: object = None) -> None:
    """`model.load_state_dict`, strict, with one clear sentence where the names or shapes differ.

    Raises:
        CorruptError: names are missing or too many, or a shape differs.
    """
    try:
        own = as_sources(tensors, model.state_dict())
        model.load_state_dict({name: loaded(tensor) for name, tensor in own.items()})
    except RuntimeError as error:
        what, hint = _difference(model.state_dict(), tensors)
        what = what or " ".join(str(error).split())[:300]
        raise CorruptError(f"the tensors do not fit {type(model).__name__}: {what}", where, hint) from None
    except KruifyError:
        raise
    except Exception as error:  # of a user's hook or method
        what = f"load_state_dict() of {type(model).__name__} ends in {type(error).__name__}: {str(error)[:200]}"
        raise UnsupportedError(what, where, "Its hooks and methods have to take the names of factors") from error


def _difference(wanted: Mapping[str, Tensor | tuple[int, ...]], got: Mapping[str, AnyTensor]) -> tuple[str, str]:
    """What differs between the names and shapes of a model and of a file, and what to do about it."""
    hint = "Use the model that the checkpoint was made for"
    missing, extra = [n for n in wanted if n not in got], [n for n in got if n not in wanted]
    said = [_listed(missing, "missing"), _listed(extra, "not known to it")]
    shapes = {name: item if isinstance(item, tuple) else tuple(item.shape) for name, item in wanted.items()}
    said += [
        f"{name} is {'x'.join(map(str, got[name].shape))}, not {'x'.join(map(str, shape))}"
        for name, shape in shapes.items()
        if name in got and tuple(got[name].shape) != shape
    ][:3]
    for names, others, whose in ((extra, wanted, "file"), (missing, got, "model")):
        wrapper = names[0].partition(".")[0] if names else ""
        if wrapper and {name.removeprefix(f"{wrapper}.") for name in names} == set(others):
            hint = f"The names of the {whose} begin with '{wrapper}.': save or build the network with or without it"
    return "; ".join(filter(None, said)), hint


def _listed(names: list[str], what: str) -> str:
    if len(names) < 2:
        return f"{names[0]} is {what}" if names else ""
    return f"{names[0]} and {len(names) - 1} more are {what}"


def loaded(tensor: AnyTensor) -> Tensor:
    """The numbers of a tensor that may still be in its file."""
    return tensor.load() if isinstance(tensor, LazyTensor) else tensor
