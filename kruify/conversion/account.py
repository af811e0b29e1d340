"""The account of a conversion: what every gate becomes, and how many parameters that saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.locate import AnyTensor, Located, RecurrentLayer
from kruify.conversion.plan import Plan, Structures, by_gate
from kruify.decomposition import Fit


@dataclass(frozen=True)
class GateCounts:
    """What a plan makes of one gate of one matrix, or of all gates stacked ("all"), known before any work."""

    name: str
    layer: str
    gate: str
    shape: tuple[int, int]
    factors: str
    terms: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class GateResult(GateCounts):
    """What became of it; the keys of `kruify convert --json`."""

    energy: float
    energy_null: float
    relative_error: float
    energy_weighted: float | None = None  # 1 - E||(W - K) h||^2 / E||W h||^2, of a calibrated fit


@dataclass(frozen=True)
class Expected:
    """The account of a conversion that was not made (a dry run)."""

    matrices: list[GateCounts]
    parameters: dict[str, float]


@dataclass(frozen=True)
class Conversion:
    """A converted set of tensors, with the account of it."""

    plan: Plan
    tensors: dict[str, AnyTensor]
    matrices: list[GateResult]
    parameters: dict[str, float]


def expected(tensors: Mapping[str, AnyTensor], plan: Plan, located: Located) -> Expected:
    """What `convert_tensors` would make of the sizes, without decomposing anything."""
    matrices = [gate for layer, weight, s in plan.matrices() for gate in gate_counts(layer, weight, s)]
    recurrent = {layer.full_name("weight_hh" + suffix) for layer in located.layers for suffix in layer.suffixes}
    tied = ties(as_lazy(tensors))
    becomes = {(gate.name, gate.gate): gate.factors for gate in matrices}
    saved = {"recurrent": 0, "total": 0}
    for gate in matrices:
        gain = gate.parameters_before - gate.parameters_after
        if gate.name in tied:
            same = becomes.get((tied[gate.name], gate.gate)) == gate.factors
            gain = 0 if same else -gate.parameters_after
        saved["total"] += gain
        saved["recurrent"] += gain if gate.name in recurrent else 0
    counted = {name: _numel(tensor) for name, tensor in tensors.items() if name not in tied}
    before = {
        "recurrent": sum(count for name, count in counted.items() if name in recurrent),
        "total": sum(counted.values()),
    }
    parameters: dict[str, float] = {}
    for part, count in before.items():
        parameters |= before_after(part, count, count - saved[part])
    return Expected(matrices, parameters)


def count_parameters(
    before: Mapping[str, AnyTensor], after: Mapping[str, AnyTensor], located: Located
) -> dict[str, float]:
    """Floating-point numbers before and after: in recurrent matrices, and in all tensors; tied ones count once."""
    recurrent = {layer.full_name("weight_hh" + suffix) for layer in located.layers for suffix in layer.suffixes}
    tied = ties(as_lazy(before))
    counts = {"recurrent": [0, 0], "total": [0, 0]}
    for place, tensors in enumerate((before, after)):
        for name, tensor in tensors.items():
            count, source = _numel(tensor), name
            while source not in before and source:  # the entries of a matrix stand under its name
                source = source.rpartition(".")[0]
            first = tensors.get(tied[source] + name.removeprefix(source)) if source in tied else None
            if first is not None and first.shape == tensor.shape:
                continue
            counts["total"][place] += count
            counts["recurrent"][place] += count if source in recurrent else 0
    return {**before_after("recurrent", *counts["recurrent"]), **before_after("total", *counts["total"])}


def before_after(part: str, before: int, after: int) -> dict[str, float]:
    """The three keys of one part of the account: `{part}_before`, `{part}_after`, `{part}_ratio`."""
    return {f"{part}_before": before, f"{part}_after": after, f"{part}_ratio": before / max(1, after)}


def gate_counts(layer: RecurrentLayer, weight: str, structures: Structures) -> list[GateCounts]:
    """What the structures make of the gates of one matrix."""
    return [
        GateCounts(
            name=layer.full_name(weight),
            layer=layer.name,
            gate=gate,
            shape=(s.rows, s.cols),
            factors=str(s),
            terms=sum(term.rank for term in s.terms),
            parameters_before=s.dense_parameters,
            parameters_after=s.parameters,
        )
        for gate, s in by_gate(layer, structures).items()
    ]


def gate_results(counts: list[GateCounts], fits: list[Fit]) -> list[GateResult]:
    """What the fits, one a gate, made of it."""
    return [
        GateResult(
            **vars(gate),
            energy=f.energy,
            energy_null=f.energy_null,
            relative_error=f.relative_error,
            energy_weighted=None if math.isnan(f.energy_weighted) else f.energy_weighted,
        )
        for gate, f in zip(counts, fits, strict=True)
    ]


def _numel(tensor: AnyTensor) -> int:
    if not tensor.dtype.is_floating_point:
        return 0
    return tensor.numel if isinstance(tensor, LazyTensor) else tensor.numel()
