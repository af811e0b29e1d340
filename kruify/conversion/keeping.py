"""What a user put on a layer, kept when another layer takes its place: hooks, attributes, buffers, submodules."""

from __future__ import annotations

from typing import Any

from torch import nn

from kruify.conversion.computed import keep_computed
from kruify.errors import UnsupportedError

_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("hooks", "_with_kwargs", "_always_called"))]
# Made anew when they are needed, and marks of how the weights of the old layer were stored.
_CACHES = ("_kernel_streaming", "_compiled_call_impl", "_kruify_storage")


def keep_additions(old: nn.Module, fresh: nn.Module, new: nn.Module, name: str) -> None:
    """Puts on `new` what `old` has beyond `fresh`, a layer of its class as the constructor leaves it.

    Raises:
        UnsupportedError: it has a method replaced, or an attribute whose name `new` needs.
    """
    where = name or type(old).__name__
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    done = keep_computed(old, new)
    for key, value in _beyond(vars(old), vars(fresh), done).items():
        if key == "forward" or getattr(value, "__self__", None) is old:
            raise UnsupportedError(f"its {key}() is replaced by a function of its own", where, "Wrap it in a module")
        if hasattr(new, key) and not hasattr(type(old), key):
            raise UnsupportedError(f"its attribute '{key}' has another use in {type(new).__name__}", where, "Rename it")
        setattr(new, key, value)
    for key, buffer in _beyond(old._buffers, fresh._buffers, done).items():
        new.register_buffer(key, buffer, persistent=key not in old._non_persistent_buffers_set)
    for key, parameter in _beyond(old._parameters, fresh._parameters, done).items():
        new.register_parameter(key, parameter)
    for key, child in _beyond(old._modules, fresh._modules, done).items():
        new.add_module(key, child)


def _beyond(found: dict[str, Any], known: dict[str, Any], done: set[str]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in known and key not in _CACHES and key not in done}
