"""Swaps dense recurrent matrices for Kronecker sums, in state dicts and in modules. Nothing else swaps layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kruify.calibrate import Moments, bias_correction
from kruify.checkpoint import LazyTensor
from kruify.conditioning import exact
from kruify.decompose import Fit, Relabelling, fit
from kruify.errors import CorruptError, PlanError
from kruify.layers import KRU, KRUGRU, KRULSTM, KRURNN, KroneckerMatrix, KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.assign import assign
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase
from kruify.layers.relabel import Relabel, Units, dense_weight, set_relabel, weight_inside
from kruify.locate import KRU_KINDS, MODULES, AnyTensor, Located, RecurrentLayer, describe
from kruify.plan import LayerPlan, Plan, Structures, check_signs
from kruify.relabel import RelabelResult, moments_inside, relabel_account, relabel_name, tensors_inside, tensors_outside

KRU_CLASSES: dict[tuple[str, bool], type[KRUBase] | type[KRUCellBase]] = {
    ("rnn", False): KRURNN,
    ("lstm", False): KRULSTM,
    ("gru", False): KRUGRU,
    ("rnn", True): KRURNNCell,
    ("lstm", True): KRULSTMCell,
    ("gru", True): KRUGRUCell,
}
Factored = KRUBase | KRUCellBase | KRU
Progress = Callable[[int, int, str], None]  # matrices done, matrices in all, name of the one just done


@dataclass(frozen=True)
class GateCounts:
    """What a plan makes of one gate of one matrix, known before any work."""

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
    relabelled: list[RelabelResult] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """A converted set of tensors, with the account of it."""

    plan: Plan
    tensors: dict[str, AnyTensor]
    matrices: list[GateResult]
    parameters: dict[str, float]
    relabelled: list[RelabelResult] = field(default_factory=list)


def convert_tensors(
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    located: Located,
    *,
    moments: Mapping[str, Moments] | None = None,
    unitary: bool = False,
    searched: Mapping[str, Relabelling] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Decomposes every matrix that the plan names; all other tensors are handed on untouched, but for those of the
    layers and directions whose units the plan relabels.

    Args:
        moments: full weight name -> moments of what the matrix is applied to (kruify.calibrate). With them the fit
            minimises the error of the output, E||(W - K) h||^2, and the bias beside the matrix takes up (W - K) E[h];
            a layer without bias gets none. Matrices that are not named are fitted unweighted.
        unitary: fit orthogonal factors to the recurrent matrices of plain RNNs, whose scale is separate: the start
            for fine-tuning with the soft unitary penalty.
        searched: what `relabel_plan` found, for the account.

    Raises:
        PlanError: a layer or a matrix of the plan is not in the tensors, or has another size.
    """
    check_plan(plan, located)
    converted = dict(tensors)
    relabels = tensors_inside(converted, plan)
    results: list[GateResult] = []
    todo = list(plan.matrices())
    for done, (layer, weight, structures) in enumerate(todo, 1):
        name = layer.full_name(weight)
        dense = _load(converted.pop(name))
        known = (moments or {}).get(name)
        if known is not None and name in relabels:
            known = moments_inside(known, relabels[name])
        orthogonal = unitary and structures[0].scaled and weight.startswith("weight_hh")
        covariance = None if known is None or orthogonal else known.weight(layer.bias)
        matrix, fits = decompose_matrix(dense, structures, name, covariance=covariance, unitary=orthogonal, seed=seed)
        if known is not None and layer.bias:
            bias_name = layer.full_name(weight.replace("weight", "bias"))
            bias = _load(converted[bias_name])
            correction = bias_correction(dense, matrix.to_dense(), known.mean)
            converted[bias_name] = (bias.double() + correction.to(bias.device)).to(bias.dtype)
        for entry, value in matrix.state_dict().items():
            converted[f"{name}.{entry}"] = value
        results += _results(_counts(layer, weight, structures), fits)
        if progress:
            progress(done, len(todo), name)
    converted = {name: converted[name] for name in _in_order(tensors, converted, relabels)}
    counts = count_parameters(tensors, converted, located)
    return Conversion(plan, converted, results, counts, relabel_account(plan, searched))


def decompose_matrix(
    dense: Tensor,
    structures: Structures,
    name: str,
    *,
    covariance: Tensor | None = None,
    unitary: bool = False,
    seed: int = 0,
) -> tuple[KroneckerMatrix, list[Fit]]:
    """One stacked weight (gates * rows, cols) -> its `KroneckerMatrix` in the dtype of the weight, one `Fit` a gate."""
    rows, cols = structures[0].rows, structures[0].cols
    if tuple(dense.shape) != (rows * len(structures), cols):
        raise PlanError(f"the plan is made for {rows}x{cols} gates, the tensor is {tuple(dense.shape)}", name)
    gates = dense.reshape(len(structures), rows, cols)
    fits = [
        fit(gate, s, covariance=covariance, unitary=unitary, seed=seed)
        for gate, s in zip(gates, structures, strict=True)
    ]
    matrix = KroneckerMatrix(structures, dtype=dense.dtype)
    assign(matrix, fits)
    return matrix, fits


def check_plan(plan: Plan, located: Located) -> None:
    """Raises `PlanError` unless every layer of the plan is there and has the sizes that the plan was made for."""
    found = {layer.name: layer for layer in located.layers}
    for layer, weight, structures in plan.matrices():
        actual = found.get(layer.name)
        if actual is None:
            raise PlanError(f"the plan names layer '{layer.name}', which the model does not have: {sorted(found)}")
        suffix = weight.removeprefix("weight_ih").removeprefix("weight_hh")
        if (actual.kind, actual.cell) != (layer.kind, layer.cell) or suffix not in actual.suffixes:
            raise PlanError(f"the plan's '{layer.full_name(weight)}' does not fit the {actual.kind} in the model")
        if (structures[0].rows, structures[0].cols) != actual.shape(weight):
            have = "x".join(map(str, actual.shape(weight)))
            raise PlanError(
                f"the plan is made for {structures[0].rows}x{structures[0].cols} gates, the model has {have}",
                layer.full_name(weight),
            )
    for item in plan.layers:
        for weight, units in item.relabelled.items():
            actual = found[item.layer.name]
            check_signs(units, actual if actual.nonlinearity else item.layer, weight)


def count_parameters(
    before: Mapping[str, AnyTensor], after: Mapping[str, AnyTensor], located: Located
) -> dict[str, float]:
    """Floating-point numbers before and after: in recurrent matrices, and in all tensors."""
    recurrent = [layer.full_name("weight_hh" + suffix) for layer in located.layers for suffix in layer.suffixes]
    kept = sum(_numel(t) for name, t in after.items() if any(name == r or name.startswith(f"{r}.") for r in recurrent))
    return {
        **before_after("recurrent", sum(_numel(before[name]) for name in recurrent), kept),
        **before_after("total", sum(map(_numel, before.values())), sum(map(_numel, after.values()))),
    }


def expected(
    tensors: Mapping[str, AnyTensor],
    plan: Plan,
    located: Located,
    searched: Mapping[str, Relabelling] | None = None,
) -> Expected:
    """What `convert_tensors` would make of the sizes, without decomposing anything."""
    matrices = [gate for layer, weight, s in plan.matrices() for gate in _counts(layer, weight, s)]
    recurrent = {layer.full_name(weight) for layer, weight, _ in plan.matrices() if weight.startswith("weight_hh")}
    saved = {"recurrent": 0, "total": 0}
    for gate in matrices:
        gain = gate.parameters_before - gate.parameters_after
        saved["total"] += gain
        saved["recurrent"] += gain if gate.name in recurrent else 0
    before = {
        "recurrent": sum(layer.recurrent_parameters for layer in located.layers),
        "total": sum(map(_numel, tensors.values())),
    }
    parameters: dict[str, float] = {}
    for part, count in before.items():
        parameters |= before_after(part, count, count - saved[part])
    return Expected(matrices, parameters, relabel_account(plan, searched))


def before_after(part: str, before: int, after: int) -> dict[str, float]:
    """The three keys of one part of the account: `{part}_before`, `{part}_after`, `{part}_ratio`."""
    return {f"{part}_before": before, f"{part}_after": after, f"{part}_ratio": before / max(1, after)}


def build_layer(
    item: LayerPlan, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Factored:
    """The KRU layer of one entry of a plan, its numbers still random."""
    layer = item.layer
    if layer.kind in KRU_KINDS:
        specs = {str(structure) for structures in item.matrices.values() for structure in structures}
        if len(specs) != 1:
            raise PlanError(f"all layers of a KRU have the same factors, got {len(specs)} specs", layer.name)
        return _build_kru(layer, specs.pop(), device, dtype)
    kru = KRU_CLASSES[layer.kind, layer.cell]
    built = kru(layer.input_size, layer.hidden_size, factors=item.matrices, **_options(layer, device, dtype))
    for weight, units in item.relabelled.items():
        set_relabel(built, weight.removeprefix("weight_hh"), units)
    return built


def _build_kru(
    layer: RecurrentLayer, spec: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> KRU:
    return KRU(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        bool(layer.batch_first),
        layer.dropout or 0.0,
        factors=spec,
        complex_state=layer.kind == "kru",
        nonlinearity=layer.nonlinearity or "modrelu",
        device=device,
        dtype=(dtype or getattr(torch, layer.dtype)).to_real(),
    )


def build_dense(
    layer: RecurrentLayer, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The torch.nn layer of a description, its numbers still random."""
    dense = next(cls for cls, key in MODULES.items() if key == (layer.kind, layer.cell))
    return dense(layer.input_size, layer.hidden_size, **_options(layer, device, dtype))


def _options(layer: RecurrentLayer, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Constructor options that torch.nn's layers and kruify's share; what is not known gets torch's default."""
    options: dict[str, Any] = {"bias": layer.bias, "device": device, "dtype": dtype or getattr(torch, layer.dtype)}
    if layer.kind == "rnn":
        options["nonlinearity"] = layer.nonlinearity or "tanh"
    if not layer.cell:
        options |= {
            "num_layers": layer.num_layers,
            "bidirectional": layer.bidirectional,
            "batch_first": bool(layer.batch_first),
            "dropout": (layer.dropout or 0.0) if layer.num_layers > 1 else 0.0,
        }
        if layer.kind == "lstm":
            options["proj_size"] = layer.proj_size
    return options


def swap(model: nn.Module, plan: Plan) -> nn.Module:
    """Puts the plan's KRU layers into `model`, in place, dense weights copied and factors random; returns the model.

    A bare nn.LSTM cannot be changed into another class: then the new layer itself is returned. What the plan does not
    know (batch_first, dropout, the nonlinearity: a state dict does not tell) is taken from the dense layer.

    Raises:
        PlanError: a layer of the plan is not in the model or differs from it.
    """
    for item in plan.layers:
        try:
            dense = model.get_submodule(item.layer.name)
        except AttributeError:
            raise PlanError(f"the model has no layer '{item.layer.name}'", type(model).__name__) from None
        if item.layer.kind in KRU_KINDS and not isinstance(dense, KRU):
            raise PlanError(
                f"layer '{item.layer.name}' is a Kronecker Recurrent Unit in the file, a {type(dense).__name__} here",
                type(model).__name__,
                "Build the model with kruify.layers.KRU in its place",
            )
        if isinstance(dense, Factored):
            if matrices_of(dense) != item.matrices or set(relabelled_of(dense)) != set(item.relabelled):
                raise PlanError(f"layer '{item.layer.name}' holds other factors than the plan", type(model).__name__)
            continue
        if not isinstance(dense, tuple(MODULES)):
            raise PlanError(f"layer '{item.layer.name}' is a {type(dense).__name__}, not a recurrent layer of torch.nn")
        actual = describe(item.layer.name, dense)
        check_plan(Plan([item]), Located([actual], []))
        weight = next(dense.parameters())
        layer = build_layer(LayerPlan(actual, item.matrices, item.relabelled), weight.device, weight.dtype)
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                target = getattr(layer, name, None)
                if isinstance(target, nn.Parameter):
                    target.copy_(weight_inside(layer, name, parameter))
                    target.requires_grad_(parameter.requires_grad)
        layer.train(dense.training)
        model = _set_submodule(model, item.layer.name, layer)
    return model


def convert_module(
    model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[str, Moments] | None = None,
    unitary: bool = False,
    searched: Mapping[str, Relabelling] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Conversion]:
    """A copy of `model` with the plan's layers decomposed and swapped; the original is untouched."""
    located = Located([item.layer for item in plan.layers], [])
    with torch.no_grad():
        tensors = model.state_dict()
        conversion = convert_tensors(
            tensors, plan, located, moments=moments, unitary=unitary, searched=searched, seed=seed, progress=progress
        )
        converted = swap(copy.deepcopy(model), plan)
        load_tensors(converted, conversion.tensors)
    return converted, conversion


def load_tensors(model: nn.Module, tensors: Mapping[str, AnyTensor], where: object = None) -> None:
    """`model.load_state_dict`, strict, with one clear sentence where the names or shapes differ.

    Raises:
        CorruptError: names are missing or too many, or a shape differs.
    """
    try:
        model.load_state_dict({name: _load(tensor) for name, tensor in tensors.items()})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CorruptError(
            f"the tensors do not fit {type(model).__name__}: {' '.join(lines[1:3])[:300]}",
            where,
            "Use the model that the checkpoint was made for",
        ) from None


def plan_of(model: nn.Module) -> Plan:
    """The plan that the KRU layers of a module embody."""
    plans = []
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            plans.append(LayerPlan(describe_kru(name, module), matrices_of(module), relabelled_of(module)))
    return Plan(plans)


def matrices_of(module: Factored) -> dict[str, Structures]:
    return {n: child.structures for n, child in module.named_children() if isinstance(child, KroneckerMatrix)}


def relabelled_of(module: Factored) -> dict[str, Units]:
    children = module.named_children()
    return {f"weight_hh{n.removeprefix('relabel')}": c.units for n, c in children if isinstance(c, Relabel)}


def describe_kru(name: str, module: Factored) -> RecurrentLayer:
    """The description of a KRU layer, that of the dense layer it stands for where there is one."""
    if isinstance(module, KRU):
        dtype = str(module.state_dtype.to_real()).removeprefix("torch.")
        return RecurrentLayer(
            name, "kru" if module.complex_state else "kru-real", False, module.input_size, module.hidden_size,
            module.num_layers, bias=module.bias, batch_first=module.batch_first, dropout=module.dropout,
            nonlinearity=module.nonlinearity, dtype=dtype,
        )  # fmt: skip
    cell = isinstance(module, KRUCellBase)
    nonlinearity = module.nonlinearity if module.kind == "rnn" else None
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    layer = RecurrentLayer(
        name, module.kind, cell, module.input_size, module.hidden_size, bias=module.bias,
        nonlinearity=nonlinearity, dtype=dtype,
    )  # fmt: skip
    if isinstance(module, KRUBase):
        fields = ("num_layers", "bidirectional", "proj_size", "batch_first", "dropout")
        layer = RecurrentLayer(**{**layer.__dict__, **{f: getattr(module, f) for f in fields}})
    return layer


def densify(model: nn.Module) -> nn.Module:
    """A copy of `model` with every KRU layer turned into torch.nn's dense one of the same function.

    A `KRU`, which torch.nn does not know, becomes one with a single dense factor.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Factored):
            model = _set_submodule(model, name, _dense_layer(name, module))
    return model


def densify_tensors(tensors: Mapping[str, AnyTensor], plan: Plan) -> dict[str, Tensor]:
    """The state dict of the dense model that a converted state dict stands for.

    Raises:
        CorruptError: an entry of the plan is missing from the tensors, or has another shape.
    """
    dense = {name: _load(tensor) for name, tensor in tensors.items()}
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
    tensors_outside(dense, plan)
    return {name: dense[name] for name in order if name in dense}


def _dense_layer(name: str, module: Factored) -> nn.Module:
    weight = next(module.parameters())
    if isinstance(module, KRU):
        return dense_kru(module)
    dense = build_dense(describe_kru(name, module), weight.device, weight.dtype)
    with torch.no_grad():
        for parameter_name, parameter in dense.named_parameters():
            parameter.copy_(dense_weight(module, parameter_name))
    return dense.train(module.training)


@torch.no_grad()
def dense_kru(module: KRU, dtype: torch.dtype | None = None) -> KRU:
    """A KRU of the same function whose recurrent matrices are one dense factor each, in real precision `dtype`."""
    size = module.hidden_size
    dense = _build_kru(describe_kru("", module), f"{size}x{size}", next(module.parameters()).device, dtype)
    own = dict(dense.named_parameters())
    for name, child in module.named_children():
        if isinstance(child, KroneckerMatrix):
            own.pop(f"{name}.terms.0.factors.0").copy_(child.to_dense().expand(1, 1, size, size))
    for name, parameter in own.items():
        parameter.copy_(module.get_parameter(name))
    return dense.train(module.training)


def _counts(layer: RecurrentLayer, weight: str, structures: Structures) -> list[GateCounts]:
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
        for gate, s in zip(layer.gates, structures, strict=True)
    ]


def _results(counts: list[GateCounts], fits: list[Fit]) -> list[GateResult]:
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


def _set_submodule(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if not name:
        return child
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, child)
    return model


def _in_order(before: Mapping[str, AnyTensor], after: Mapping[str, AnyTensor], relabels: Collection[str]) -> list[str]:
    """Names of `after`, the new ones standing where the matrix they replace stood, a relabelling by its matrix."""
    position = {name: i for i, name in enumerate(before)}
    for name in relabels:
        position[relabel_name(name)] = position[name]

    def place(name: str) -> int:
        while name not in position:
            name = name.rpartition(".")[0]
        return position[name]

    return sorted(after, key=place)


def _numel(tensor: AnyTensor) -> int:
    if not tensor.dtype.is_floating_point:
        return 0
    return tensor.numel if isinstance(tensor, LazyTensor) else tensor.numel()


def _load(tensor: AnyTensor) -> Tensor:
    return tensor.load() if isinstance(tensor, LazyTensor) else tensor
