"""Which weights are stored in which dtype, and the writing of a converted network."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kruify.checkpoint import LazyTensor, metadata_for, write_model
from kruify.checkpoint.integers import integer_dims
from kruify.checkpoint.sparse_index import VALUES
from kruify.checkpoint.stored import decode, encode, told_storage
from kruify.checkpoint.summed_biases import SUM, SUM_BUT_N, SUMS, first_bias
from kruify.checkpoint.tensors import derived, ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.build import plan_of
from kruify.conversion.check import load_tensors, stored_shapes
from kruify.conversion.computed import copied, state_of
from kruify.conversion.locate import BESIDE, AnyTensor, RecurrentLayer, locate
from kruify.conversion.modules import swap
from kruify.conversion.plan import LayerPlan, Plan, Structures, matches
from kruify.errors import PlanError, UsageError
from kruify.layers.storage import mark
from kruify.progress import Progress
from kruify.quantization import DTYPES, INTEGERS, in_pairs

BIAS_DTYPE = "float16"
"""Of biases of recurrent layers, where matrices are stored as integers."""


def check_storage(dtype: str | None, keep: Sequence[str] = (), graph: bool = False) -> None:
    """Raises `UsageError` for a dtype that nothing, or no graph, is stored in, and for weights to keep without one."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no storage as '{dtype}'", hint=f"Choose from {', '.join(DTYPES)}")
    if graph and dtype == "int4":
        raise UsageError("four bits are for kruify's own files", "int4", "Take int8 for an ONNX graph")
    if keep and dtype is None:
        raise UsageError("weights are kept from a dtype, and none is given", hint="Give --dtype, too")


def storage_for(
    tensors: Mapping[str, AnyTensor], plan: Plan, dtype: str | None, keep: Sequence[str] = ()
) -> dict[str, str]:
    """The weights that `dtype` is for -> `dtype`; {} where it is None or "float32".

    int8 is for Kronecker matrices (factors, sparse residual) and tensors with two or more dimensions; biases of
    recurrent layers, which are as large as small factors, are float16 then, and one vector where they are only added
    (`checkpoint.summed_biases.SUMS`). int4 is for the same, but dense tensors whose rows are not `in_pairs` stay
    int8. float16 and bfloat16 are for all real numbers.

    Args:
        keep: globs of weights, or of modules with all their weights, that stay float32, under all names that they have.

    Raises:
        UsageError: no such dtype. PlanError: a pattern matches nothing.
    """
    check_storage(dtype, keep)
    matrices, seconds, lazy = matrix_sizes(plan), _second_biases(plan), as_lazy(tensors)
    biases, same = {*seconds, *map(first_bias, seconds)}, _names_of_each(lazy)
    weights = {name: next((m for m in _prefixes(name) if m in matrices), name) for name in lazy}
    matching = {w: [p for p in keep if any(matches(prefix, p) for prefix in _prefixes(w))] for w in weights.values()}
    if unused := set(keep).difference(*matching.values()):
        raise PlanError(f"the pattern '{min(unused)}' to keep matches no weight")
    kept = {weights[other] for name in lazy if matching[weights[name]] for other in same[name]}
    found: dict[str, str] = {}
    for name, tensor in lazy.items():
        weight = weights[name]
        matrix = weight if weight in matrices else None
        if dtype in (None, "float32") or weight in kept or not tensor.dtype.is_floating_point:
            continue
        if dtype not in INTEGERS or (matrix and name == matrix + VALUES):
            found[weight] = dtype
        elif dims := integer_dims(name, tensor, matrix, lazy):
            found[weight] = dtype if matrix or in_pairs(tensor.shape, dims) else "int8"
        elif name in biases:
            found[name] = BIAS_DTYPE
    return found | (_sums(seconds, same, found) if dtype in INTEGERS else {})


def _names_of_each(tensors: Mapping[str, LazyTensor]) -> dict[str, set[str]]:
    """Name -> all names that its tensor has."""
    names: dict[Hashable, set[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(name if tensor.identity is None else tensor.identity, set()).add(name)
    return {name: others for others in names.values() for name in others}


def _sums(seconds: Mapping[str, str], same: Mapping[str, set[str]], storage: Mapping[str, str]) -> dict[str, str]:
    """Those of the second biases that are only added to the first ones, also under the other names that the two have:
    a tensor that has another partner there, or is kept, cannot become a sum. `same` is that of `_names_of_each`."""
    found = {}
    for second, how in seconds.items():
        first = first_bias(second)
        if second in storage and first in storage:
            alike = same[first] == set(map(first_bias, same[second])) and all(
                seconds.get(n) == how for n in same[second]
            )
            if alike and {*same[first], *same[second]} <= storage.keys():
                found[second] = how
    return found


def in_float32(tensors: Mapping[str, AnyTensor]) -> dict[str, LazyTensor]:
    """The tensors, real numbers as float32."""

    def cast(tensor: LazyTensor) -> LazyTensor:
        if not tensor.dtype.is_floating_point or tensor.dtype == torch.float32:
            return tensor
        identity = derived("float32", tensor.identity)  # tied ones stay tied
        return LazyTensor(tensor.shape, torch.float32, lambda: tensor.load().float(), identity)

    return {name: cast(tensor) for name, tensor in as_lazy(tensors).items()}


def with_dense(plan: Plan, layers: Sequence[RecurrentLayer]) -> Plan:
    """The plan for `layers`, with recurrent ones that it does not name as dense ones: kruify's layers have integer
    kernels, torch's have none."""
    matrices = {item.layer.name: item.matrices for item in plan.layers}
    recurrent = [layer for layer in layers if layer.kind not in BESIDE]
    return replace(plan, layers=[LayerPlan(layer, matrices.get(layer.name, {})) for layer in recurrent])


def planned(tensors: Mapping[str, AnyTensor], plan: Plan) -> dict[str, LazyTensor]:
    """Shapes and dtypes of what the plan makes of dense tensors; the numbers of its matrices cannot be loaded."""
    found = as_lazy(tensors)
    for layer, weight, structures in plan.matrices():
        name = layer.full_name(weight)
        dense = found.pop(name)
        found |= planned_matrix(name, structures, dense.dtype, dense.identity)
    return found


def planned_matrix(
    name: str, structures: Structures, dtype: torch.dtype, dense: Hashable = None
) -> dict[str, LazyTensor]:
    """Shapes and dtypes of the tensors of one Kronecker matrix; they cannot be loaded.

    Args: dense: the identity of the matrix in whose place they stand.
    """
    found = {}
    for entry, shape in stored_shapes(structures).items():
        kind = torch.int32 if entry == "overlay.index" else dtype
        found[f"{name}.{entry}"] = LazyTensor(shape, kind, no_numbers, derived(entry, structures, dense))
    return found


def no_numbers() -> Tensor:
    """What a planned tensor loads with."""
    raise RuntimeError("what is planned has no numbers")


def stored_bytes(tensors: Mapping[str, AnyTensor], plan: Plan, storage: Mapping[str, str]) -> int:
    """Bytes that the tensors take in a file, without its header."""
    return weight_bytes(encode(tensors, storage, matrix_sizes(plan)))


def weight_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes of tensors as they are, tied ones once."""
    second = ties(tensors)
    return sum(tensor.nbytes for name, tensor in tensors.items() if name not in second)


def matrix_sizes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Full name of every Kronecker matrix -> (rows of all gates, columns)."""
    return {name: (sum(s.rows for s in found), found[0].cols) for name, found in plan.structures().items()}


def rounded(
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    storage: Mapping[str, str],
    scales: MutableMapping[str, Tensor] | None = None,
) -> dict[str, LazyTensor]:
    """The tensors as they will be when a file that stores them so is read.

    Args:
        scales: those of `encode`.

    Raises:
        UnsupportedError: on loading, a number has no form in the dtype.
    """
    matrices = matrix_sizes(plan)
    return decode(encode(tensors, storage, matrices, False, scales), storage, matrices, "storage")


def write_converted(
    path: str | os.PathLike[str],
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    storage: Mapping[str, str],
    *,
    progress: Progress | None = None,
    **about: Any,
) -> None:
    """Writes the tensors of a converted network as `storage` says, with its plan: safetensors, or a .pt file.

    Args:
        about: what else the file says (`as_file`).

    Raises:
        UsageError: the file cannot be written. UnsupportedError: a number has no form in its dtype.
    """
    write_model(path, *as_file(tensors, plan, storage, **about), progress=progress)


def as_file(
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    storage: Mapping[str, str],
    *,
    source_sha256: str = "",
    seed: int = 0,
    extra: Mapping[str, str] | None = None,
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors and metadata of the file of a converted network."""
    matrices = matrix_sizes(plan)
    stored = encode(tensors, storage, matrices)
    said = None if told_storage(stored, matrices) == storage else storage
    plan_text = plan.to_compact_json()
    return stored, metadata_for(plan_text, source_sha256=source_sha256, seed=seed, storage=said, extra=extra)


def quantize(model: nn.Module, dtype: str, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of a network whose weights are stored as `dtype`: rounded to it now, and written so by `kruify.save`.

        small = kruify.quantize(model, "int8", keep=["embedding"])

    Recurrent layers of torch.nn become kruify's, with dense weights where they are not factored, and all real numbers
    float32. What is computed is computed in float32, or on a CPU in integers (kruify.layers).

    Args:
        dtype: "int8" (symmetric, one bfloat16 scale per row; biases of recurrent layers float16, other
            vectors float32), "int4" (the same in four bits; `convert(model, "dense", dtype="int4", task=...)` loses far
            less), "float16", "bfloat16" or "float32".
        keep: globs of weights or modules that stay float32.

    Raises:
        UsageError: no such dtype. PlanError: a pattern matches nothing. UnsupportedError: a number has no form in it.
    """
    model = copied(model).float()
    model = swap(model, with_dense(Plan(), locate(model).layers))
    return store_as(model, storage_for(state_of(model), plan_of(model), dtype, keep))


@torch.no_grad()
def store_as(model: nn.Module, storage: Mapping[str, str]) -> nn.Module:
    """Rounds the weights of a network in place and marks them; returns the network. A weight that is computed from
    others (pruning, weight norm) is marked alone: it is rounded when it is written."""
    load_tensors(model, rounded_state(model, storage))
    mark(model, storage)
    return model


def rounded_state(
    model: nn.Module, storage: Mapping[str, str], scales: MutableMapping[str, Tensor] | None = None
) -> dict[str, LazyTensor]:
    """The state dict of a network in the numbers that storing it so keeps, but for weights that are computed from
    others: those are rounded when they are written.

    Args:
        scales: those of `checkpoint.stored.encode`.

    Raises:
        UnsupportedError: on loading, a number has no form in the dtype.
    """
    state, plan = model.state_dict(), plan_of(model)
    known = {*state, *matrix_sizes(plan)}
    held = {n: dtype for n, dtype in storage.items() if n in known and (dtype not in SUMS or first_bias(n) in known)}
    return rounded(state, plan, held, scales)


def _second_biases(plan: Plan) -> dict[str, str]:
    """Full names that the b_hh of the plan's layers have -> how much of them is only added to b_ih."""
    return {
        item.layer.full_name(f"bias_hh{suffix}"): SUM_BUT_N if item.layer.kind == "gru" else SUM
        for item in plan.layers
        for suffix in item.layer.suffixes
    }


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
