"""Parameters that are computed from others: pruned ones, weight norm, spectral norm, parametrizations.

torch's older utilities put the result on the module before each call of it. The parts of a `KroneckerMatrix` are used
without being called, so the work is done here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Hook = BasePruningMethod | SpectralNorm | WeightNorm


def hooks(module: nn.Module) -> Iterator[tuple[int, str, Hook]]:
    """Number among the module's hooks, name of the parameter, and what computes it."""
    for number, hook in module._forward_pre_hooks.items():
        if isinstance(hook, Hook):
            yield number, hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name, hook


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name`, computed anew where it is no parameter of the module itself."""
    held = module._parameters
    if name in held:
        return held[name]
    for _, computed, hook in hooks(module):
        if computed == name:
            hook(module, ())
    found: Tensor | None = getattr(module, name)
    return found


def computes(module: nn.Module) -> bool:
    """Whether a parameter in `module` may be computed from others."""
    return any(m._forward_pre_hooks or "parametrizations" in m._modules for m in module.modules())
