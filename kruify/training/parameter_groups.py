"""Which parameters are trained, and with which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from kruify.layers import KRU
from kruify.layers.matrix import KroneckerMatrix
from kruify.training.recipe import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser, by learning rate and weight decay; all parameters that require a gradient.

    Each group has the key "share": its peak learning rate as a multiple of `recipe.lr`. Empty groups are left out.

    Args:
        only: names of the parameters to train; None for all.
    """
    factors, modrelu = set(), set()
    for prefix, module in model.named_modules():
        if isinstance(module, KroneckerMatrix):
            factors |= {name for name, _ in module.named_parameters(prefix)}
        elif isinstance(module, KRU):
            own = [name for name, _ in module.named_parameters(prefix, recurse=False)]
            modrelu |= {name for name in own if name.rpartition(".")[2].startswith("bias")}
    modrelu_lr = recipe.factor_lr if recipe.modrelu_lr is None else recipe.modrelu_lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (only is not None and name not in only):
            continue
        decay = 0.0 if parameter.ndim < 2 or name in factors else recipe.weight_decay
        share = recipe.factor_lr if name in factors else modrelu_lr if name in modrelu else 1.0
        groups.setdefault((share, decay), []).append(parameter)
    return [{"params": p, "share": s, "weight_decay": d} for (s, d), p in sorted(groups.items(), key=lambda g: g[0])]
