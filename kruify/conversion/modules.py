"""Conversion of modules: layers swapped for their stand-ins, there and back. Nothing else swaps layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from kruify.conversion.build import (
    Factored,
    build_dense,
    build_kru,
    build_layer,
    describe_kru,
    matrices_of,
)
from kruify.conversion.calibration import Moments
from kruify.conversion.check import check_plan, load_tensors
from kruify.conversion.computed import copied, state_of
from kruify.conversion.keeping import keep_additions
from kruify.conversion.locate import BESIDE, KRU_KINDS, MODULES, Located, describe, locate
from kruify.conversion.plan import LayerPlan, Plan, Structures, plan_from
from kruify.conversion.result import Conversion
from kruify.conversion.tensors import convert_tensors
from kruify.errors import PlanError
from kruify.layers import KRU, KroneckerEmbedding, KroneckerMatrix
from kruify.progress import Progress


def swap(model: nn.Module, plan: Plan) -> nn.Module:
    """Puts the plan's KRU layers into `model`, in place, dense weights copied and factors random; returns the model.

    A bare nn.LSTM cannot be changed into another class: then the new layer itself is returned. What the plan does not
    know (batch_first, dropout, the nonlinearity: a state dict does not tell) is taken from the dense layer, and so are
    hooks, attributes and `requires_grad`. A layer that stands in several places, and a weight that several layers or
    directions share, stays one where the plan says the same of all of them.

    Raises:
        PlanError: a layer of the plan is not in the model or differs from it.
        UnsupportedError: a layer has a method replaced.
    """
    swapped: list[tuple[nn.Module, LayerPlan, nn.Module]] = []  # dense layer, its entry of the plan, what stands for it
    placed: dict[str, nn.Module] = {}  # set at the end: what is refused leaves the model as it was
    matrices: dict[tuple[int, Structures], KroneckerMatrix] = {}  # (id of the dense weight, structures) -> its factors
    for item in plan.items:
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
            if matrices_of(dense) != item.matrices:
                raise PlanError(f"layer '{item.layer.name}' holds other factors than the plan", type(model).__name__)
            continue
        own = type(dense).__bases__[0] if is_parametrized(dense) else type(dense)  # a subclass may compute anything
        if not (own in (nn.Linear, nn.Embedding) if item.layer.kind in BESIDE else isinstance(dense, tuple(MODULES))):
            wanted = item.layer.kind if item.layer.kind in BESIDE else "recurrent"
            raise PlanError(f"layer '{item.layer.name}' is a {type(dense).__name__}, not a {wanted} layer of torch.nn")
        if isinstance(dense, nn.Embedding) and dense.max_norm is not None:
            raise PlanError(f"layer '{item.layer.name}' has max_norm, which shortens rows that no factors hold")
        same = (layer for old, known, layer in swapped if old is dense and known.matrices == item.matrices)
        if (shared := next(same, None)) is not None:
            placed[item.layer.name] = shared
            continue
        actual = describe(item.layer.name, dense)
        check_plan(plan_from([item]), Located([actual], []))
        weight = next(dense.parameters())
        layer = build_layer(LayerPlan(actual, item.matrices), weight.device, weight.dtype)
        for name, parameter in dense.named_parameters(remove_duplicate=False):
            target = getattr(layer, name, None)
            if isinstance(target, KroneckerMatrix):
                target.requires_grad_(parameter.requires_grad)
                setattr(layer, name, matrices.setdefault((id(parameter), target.structures), target))
            elif isinstance(target, nn.Parameter):
                setattr(layer, name, parameter)
        if isinstance(layer, KroneckerEmbedding):
            layer.padding_idx = getattr(dense, "padding_idx", None)
        keep_additions(dense, build_dense(actual, "meta"), layer, item.layer.name)
        layer.train(dense.training)
        swapped.append((dense, item, layer))
        placed[item.layer.name] = layer
    for name, new in placed.items():
        model = _set_submodule(model, name, new)
    return model


def convert_module(
    model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[str, Moments] | None = None,
    storage: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Conversion]:
    """A copy of `model` with the plan's layers decomposed and swapped; the original is untouched.

    Args:
        moments, storage: as `convert_tensors`.
    """
    converted = swap(copied(model), plan)  # first, because it may refuse
    located = locate(model, subclasses=True).with_beside(item.layer for item in plan.beside)
    conversion = convert_tensors(
        state_of(model), plan, located, moments=moments, storage=storage, seed=seed, progress=progress
    )
    load_tensors(converted, conversion.tensors)
    return converted, conversion


def densify(model: nn.Module) -> nn.Module:
    """A copy of `model` with every KRU layer turned into torch.nn's dense one of the same function.

    Hooks, attributes, shared and computed weights stay. A `KRU`, which torch.nn does not know, becomes one with a
    single dense factor.

    Raises:
        UnsupportedError: a layer has a method replaced.
    """
    model = copied(model)
    layers: dict[nn.Module, nn.Module] = {}  # a layer that stands in several places stays one
    weights: dict[KroneckerMatrix, nn.Parameter] = {}  # and a matrix that several layers share
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored):
            if module not in layers:
                if isinstance(module, KRU):
                    layers[module] = dense_kru(module)
                    keep_additions(module, dense_kru(module), layers[module], name)
                else:
                    layers[module] = _dense_layer(name, module, weights)
            model = _set_submodule(model, name, layers[module])
    return model


@torch.no_grad()
def _dense_layer(name: str, module: Factored, weights: dict[KroneckerMatrix, nn.Parameter]) -> nn.Module:
    layer, first = describe_kru(name, module), next(module.parameters())
    dense = build_dense(layer, first.device, first.dtype)
    if isinstance(dense, nn.Embedding):
        dense.padding_idx = getattr(module, "padding_idx", None)
    for parameter_name in dict(dense.named_parameters()):
        value = getattr(module, parameter_name)
        if isinstance(value, KroneckerMatrix):
            trained = any(p.requires_grad for p in value.parameters())
            value = weights.setdefault(value, nn.Parameter(value.to_dense(), requires_grad=trained))
        if isinstance(value, nn.Parameter):  # else it is computed, and what computes it is kept below
            setattr(dense, parameter_name, value)
    keep_additions(module, build_layer(LayerPlan(layer, matrices_of(module)), "meta"), dense, name)
    return dense.train(module.training)


@torch.no_grad()
def dense_kru(module: KRU, dtype: torch.dtype | None = None) -> KRU:
    """A KRU of the same function whose recurrent matrices are one dense factor each, in real precision `dtype`."""
    size = module.hidden_size
    dense = build_kru(describe_kru("", module), f"{size}x{size}", next(module.parameters()).device, dtype)
    own = dict(dense.named_parameters())
    for name, child in module.named_children():
        if isinstance(child, KroneckerMatrix):
            factor = own.pop(f"{name}.terms.0.factors.0")
            factor.copy_(child.to_dense().expand(1, 1, size, size)).requires_grad_(child.requires_grad)
    for name, parameter in own.items():
        parameter.copy_(module.get_parameter(name)).requires_grad_(module.get_parameter(name).requires_grad)
    return dense.train(module.training)


def _set_submodule(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if not name:
        return child
    parent, _, attribute = name.rpartition(".")
    holder: Any = model.get_submodule(parent)
    setattr(holder, attribute, child)
    if attribute == "_orig_mod":  # of torch.compile, which would go on to call the old module
        holder._initialize()
    return model
