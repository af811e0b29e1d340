"""Conversion of modules: layers swapped for their stand-ins, there and back. Nothing else swaps layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

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
from kruify.conversion.locate import KRU_KINDS, MODULES, AnyTensor, Located, describe
from kruify.conversion.plan import LayerPlan, Plan
from kruify.conversion.result import Conversion
from kruify.conversion.tensors import convert_tensors
from kruify.errors import PlanError
from kruify.layers import KRU, KroneckerMatrix
from kruify.progress import Progress


def swap(model: nn.Module, plan: Plan) -> nn.Module:
    """Puts the plan's KRU layers into `model`, in place, dense weights copied and factors random; returns the model.

    A bare nn.LSTM cannot be changed into another class: then the new layer itself is returned. What the plan does not
    know (batch_first, dropout, the nonlinearity: a state dict does not tell) is taken from the dense layer. A layer
    that stands in several places stays one where the plan says the same of all of them.

    Raises:
        PlanError: a layer of the plan is not in the model or differs from it.
    """
    swapped: list[tuple[nn.Module, LayerPlan, nn.Module]] = []  # dense layer, its entry of the plan, what stands for it
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
            if matrices_of(dense) != item.matrices:
                raise PlanError(f"layer '{item.layer.name}' holds other factors than the plan", type(model).__name__)
            continue
        if not isinstance(dense, tuple(MODULES)):
            raise PlanError(f"layer '{item.layer.name}' is a {type(dense).__name__}, not a recurrent layer of torch.nn")
        same = (layer for old, known, layer in swapped if old is dense and known.matrices == item.matrices)
        if (shared := next(same, None)) is not None:
            model = _set_submodule(model, item.layer.name, shared)
            continue
        actual = describe(item.layer.name, dense)
        check_plan(Plan([item]), Located([actual], []))
        weight = next(dense.parameters())
        layer = build_layer(LayerPlan(actual, item.matrices), weight.device, weight.dtype)
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                target = getattr(layer, name, None)
                if isinstance(target, nn.Parameter):
                    target.copy_(parameter)
                    target.requires_grad_(parameter.requires_grad)
        layer.train(dense.training)
        swapped.append((dense, item, layer))
        model = _set_submodule(model, item.layer.name, layer)
    return model


def convert_module(
    model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[str, Moments] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Conversion]:
    """A copy of `model` with the plan's layers decomposed and swapped; the original is untouched."""
    located = Located([item.layer for item in plan.layers], [])
    conversion = convert_tensors(model.state_dict(), plan, located, moments=moments, seed=seed, progress=progress)
    return with_tensors(model, plan, conversion.tensors), conversion


def with_tensors(model: nn.Module, plan: Plan, tensors: Mapping[str, AnyTensor]) -> nn.Module:
    """A copy of `model` with the plan's layers swapped and the converted tensors in it."""
    converted = swap(copy.deepcopy(model), plan)
    load_tensors(converted, tensors)
    return converted


def densify(model: nn.Module) -> nn.Module:
    """A copy of `model` with every KRU layer turned into torch.nn's dense one of the same function.

    A `KRU`, which torch.nn does not know, becomes one with a single dense factor.
    """
    model = copy.deepcopy(model)
    dense: dict[nn.Module, nn.Module] = {}  # a layer that stands in several places stays one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored):
            if module not in dense:
                dense[module] = _dense_layer(name, module)
            model = _set_submodule(model, name, dense[module])
    return model


def _dense_layer(name: str, module: Factored) -> nn.Module:
    weight = next(module.parameters())
    if isinstance(module, KRU):
        return dense_kru(module)
    dense = build_dense(describe_kru(name, module), weight.device, weight.dtype)
    with torch.no_grad():
        for parameter_name, parameter in dense.named_parameters():
            value = getattr(module, parameter_name)
            parameter.copy_(value.to_dense() if isinstance(value, KroneckerMatrix) else value)
    return dense.train(module.training)


@torch.no_grad()
def dense_kru(module: KRU, dtype: torch.dtype | None = None) -> KRU:
    """A KRU of the same function whose recurrent matrices are one dense factor each, in real precision `dtype`."""
    size = module.hidden_size
    dense = build_kru(describe_kru("", module), f"{size}x{size}", next(module.parameters()).device, dtype)
    own = dict(dense.named_parameters())
    for name, child in module.named_children():
        if isinstance(child, KroneckerMatrix):
            own.pop(f"{name}.terms.0.factors.0").copy_(child.to_dense().expand(1, 1, size, size))
    for name, parameter in own.items():
        parameter.copy_(module.get_parameter(name))
    return dense.train(module.training)


def _set_submodule(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if not name:
        return child
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, child)
    return model
