"""Conversion of state dicts, tensor by tensor, there and back."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.calibration import Moments, bias_correction
from kruify.conversion.check import check_plan, load_tensors, loaded
from kruify.conversion.four_bits import round_matrix, round_weight
from kruify.conversion.locate import AnyTensor, Located
from kruify.conversion.plan import Plan, Structures
from kruify.conversion.result import Conversion, GateResult, gates_of, summed_up
from kruify.decomposition import Fit
from kruify.decomposition.fitting import check, checked_covariance, fit_with, metric_of
from kruify.errors import PlanError, UnsupportedError
from kruify.layers import KroneckerMatrix
from kruify.layers.assign import assign
from kruify.layers.matrix import exact
from kruify.progress import Progress


def convert_tensors(
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    located: Located,
    *,
    moments: Mapping[str, Moments] | None = None,
    storage: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Decomposes every matrix that the plan names; all other tensors are handed on untouched, but for those of known
    moments that will be stored in four bits.

    Names of one and the same tensor that become the same factors are decomposed once, and share them.

    Args:
        moments: full weight name -> moments of what the matrix is applied to (conversion.calibration). With them the
            fit minimises the error of the output, E||(W - K) h||^2, and the bias beside the matrix, where it is beside
            no other, takes up (W - K) E[h]; a layer without bias gets none. Matrices that are not named are fitted
            unweighted.
        storage: weight -> dtype. With moments of all names of it, a weight of four bits is rounded here
            (conversion.four_bits), a dense one, too.

    Raises:
        PlanError: a layer or a matrix of the plan is not in the tensors, or has another size.
        UnsupportedError: a matrix has entries that are NaN or infinite.
        UsageError: moments are not those of vectors that a matrix can be applied to.
    """
    check_plan(plan, located)
    converted = dict(tensors)
    results: list[GateResult] = []
    todo = list(plan.matrices())
    first_of = ties(as_lazy(tensors))
    wanted = {layer.full_name(weight): structures for layer, weight, structures in todo}
    shared: dict[tuple[str, Structures | None], tuple[KroneckerMatrix, list[Fit]]] = {}
    four_bits = {name for name, dtype in (storage or {}).items() if dtype == "int4"}

    def key_of(name: str) -> tuple[str, Structures | None]:
        return first_of.get(name, name), wanted.get(name)

    def names_of(name: str) -> list[str]:
        return [n for n in tensors if first_of.get(n, n) == first_of.get(name, name)]

    def bias_beside(name: str) -> list[str]:
        """All names of the bias that may take up what is left out; none where it is another matrix's, too."""
        names = names_of(_bias_of(name))
        return names if {key_of(_weight_of(n)) for n in names} == {key_of(name)} else []

    def weight_of_errors(name: str) -> Tensor:
        return known[name].weight(all(bias_beside(n) for n in names_of(name)))

    def correct_bias(name: str, dense: Tensor, after: Tensor) -> None:
        names = bias_beside(name)
        if names and converted[names[0]] is tensors[names[0]]:
            bias = loaded(tensors[names[0]])
            correction = bias_correction(dense, after, known[name].mean)
            converted.update(dict.fromkeys(names, (bias.double() + correction.to(bias.device)).to(bias.dtype)))

    known = _joined(moments or {}, first_of)
    for done, (layer, weight, structures) in enumerate(todo, 1):
        name = layer.full_name(weight)
        dense = loaded(converted.pop(name))
        _check_finite(dense, name)
        key = key_of(name)
        if key not in shared:
            covariance = weight_of_errors(name) if name in known else None
            shared[key] = decompose_matrix(dense, structures, name, covariance=covariance, seed=seed)
            if covariance is not None and name in four_bits:
                round_matrix(shared[key][0], dense, covariance)
        matrix, fits = shared[key]
        if name in known:
            correct_bias(name, dense, matrix.to_dense())
        for entry, value in matrix.state_dict().items():
            converted[f"{name}.{entry}"] = value
        results += gates_of(layer, weight, structures, fits)
        if progress:
            progress(done, len(todo), f"decomposing: {name}")
    for name in [n for n in tensors if n in four_bits and n in known and n not in first_of]:
        names = names_of(name)
        if wanted.keys().isdisjoint(names) and known.keys() >= {*names}:  # else it has another use, as an embedding
            dense = loaded(tensors[name])
            _check_finite(dense, name)
            after = round_weight(dense, checked_covariance(weight_of_errors(name), dense.shape[1]))
            converted |= dict.fromkeys(names, after)
            for n in names:
                correct_bias(n, dense, after)
    converted = {name: converted[name] for name in _in_order(tensors, converted)}
    return replace(summed_up(tensors, plan, results, located), tensors=converted)


def _bias_of(weight: str) -> str:
    """Name of the bias beside a matrix."""
    head, dot, name = weight.rpartition(".")
    return head + dot + name.replace("weight", "bias")


def _weight_of(bias: str) -> str:
    """Name of the matrix beside a bias."""
    head, dot, name = bias.rpartition(".")
    return head + dot + name.replace("bias", "weight")


def _joined(moments: Mapping[str, Moments], first_of: Mapping[str, str]) -> dict[str, Moments]:
    """The moments, those of all names of one matrix added up."""
    joined = dict(moments)
    for first in {first_of[name] for name in moments if name in first_of}:
        names = [name for name in moments if first_of.get(name, name) == first]
        joined |= dict.fromkeys(names, reduce(operator.add, (moments[name] for name in names)))
    return joined


def _check_finite(dense: Tensor, name: str) -> None:
    if broken := int((~dense.isfinite()).sum()):
        entries = "entry that is" if broken == 1 else "entries that are"
        hint = "Use a checkpoint from before training diverged"
        raise UnsupportedError(f"it has {broken:,} {entries} NaN or infinite", name, hint)


def decompose_matrix(
    dense: Tensor,
    structures: Structures,
    name: str,
    *,
    covariance: Tensor | None = None,
    seed: int = 0,
) -> tuple[KroneckerMatrix, list[Fit]]:
    """One weight (gates * rows, cols) -> its `KroneckerMatrix` in the dtype of the weight, one `Fit` per structure."""
    rows, cols = structures[0].rows, structures[0].cols
    if tuple(dense.shape) != (rows * len(structures), cols):
        raise PlanError(f"the plan is made for {rows}x{cols} gates, the tensor is {tuple(dense.shape)}", name)
    gates = dense.reshape(len(structures), rows, cols)
    for gate, structure in zip(gates, structures, strict=True):
        check(gate, structure)
    metric = metric_of(covariance, cols)
    fits = [fit_with(metric, gate, s, seed=seed) for gate, s in zip(gates, structures, strict=True)]
    matrix = KroneckerMatrix(structures, dtype=dense.dtype)
    assign(matrix, fits)
    return matrix, fits


def densify_tensors(tensors: Mapping[str, AnyTensor], plan: Plan) -> dict[str, Tensor]:
    """The state dict of the dense model that a converted state dict stands for.

    Raises:
        CorruptError: an entry of the plan is missing from the tensors, or has another shape.
    """
    dense = {name: loaded(tensor) for name, tensor in tensors.items()}
    order = list(dense)
    for layer, weight, structures in plan.matrices():
        name = layer.full_name(weight)
        entries = {n: dense.pop(n) for n in list(dense) if n.startswith(f"{name}.")}
        dtype = next((t.dtype for t in entries.values() if t.is_floating_point() or t.is_complex()), torch.float32)
        matrix = KroneckerMatrix(structures, dtype=dtype)
        load_tensors(matrix, {n.removeprefix(f"{name}."): t for n, t in entries.items()}, name)
        order[min(order.index(n) for n in entries)] = name
        with torch.no_grad():
            dense[name] = exact(matrix).to(dtype)
    return {name: dense[name] for name in order if name in dense}


def _in_order(before: Mapping[str, AnyTensor], after: Mapping[str, AnyTensor]) -> list[str]:
    """Names of `after`, the new ones standing where the matrix they replace stood."""
    position = {name: i for i, name in enumerate(before)}

    def place(name: str) -> int:
        while name not in position:
            name = name.rpartition(".")[0]
        return position[name]

    return sorted(after, key=place)
