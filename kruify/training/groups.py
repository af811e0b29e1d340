"""Which parameters are trained, and with which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from kruify.layers import KRU
from kruify.layers.matrix import KroneckerMatrix
from kruify.training.recipe import Recipe


def factor_names(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to Kronecker matrices: factors, scales, diagonals, overlays."""
    return {
        name
        for prefix, module in model.named_modules()
        if isinstance(module, KroneckerMatrix)
        for name, _ in module.named_parameters(prefix)
    }


def modrelu_names(model: nn.Module) -> set[str]:
    """Names of the biases of modReLU: they act on the state at every step, as the factors do."""
    return {
        name
        for prefix, module in model.named_modules()
        if isinstance(module, KRU)
        for name, _ in module.named_parameters(prefix, recurse=False)
        if name.rpartition(".")[2].startswith("bias")
    }


def parameter_groups(model: nn.Module, recipe: Recipe, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser: dense matrices, dense vectors, factors, vectors of Kronecker matrices.

    Each group has the key "share": its peak learning rate as a multiple of `recipe.lr`. Empty groups are left out.

    Args:
        only: names of the parameters to train; None for all that require a gradient.
    """
    factors = factor_names(model)
    modrelu = modrelu_names(model)
    modrelu_lr = recipe.factor_lr if recipe.modrelu_lr is None else recipe.modrelu_lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (only is not None and name not in only):
            continue
        inside = name in factors
        vector = parameter.ndim < 2 or name.endswith((".scale", ".diagonal"))
        decay = 0.0 if vector else recipe.factor_weight_decay if inside else recipe.weight_decay
        share = recipe.factor_lr if inside else modrelu_lr if name in modrelu else 1.0
        groups.setdefault((share, decay), []).append(parameter)
    return [
        {"params": p, "share": share, "weight_decay": decay}
        for (share, decay), p in sorted(groups.items(), key=lambda g: g[0])
    ]
