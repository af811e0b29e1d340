"""What a user put on a layer and its parameters, kept when another layer takes its place: hooks, attributes, buffers,
submodules."""

from __future__ import annotations

from typing import Any

from torch import nn

from kruify.conversion.computed import TENSOR_HOOKS, keep_computed
from kruify.errors import UnsupportedError
from kruify.layers import KroneckerMatrix

_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("hooks", "_with_kwargs", "_always_called"))]
# Made anew when they are needed, and marks of how the weights of the old layer were stored.
_CACHES = ("_kernel_form", "_kernel_streaming", "_compiled_call_impl", "_kruify_storage", "_complex_form")


def keep_additions(old: nn.Module, fresh: nn.Module, new: nn.Module, name: str) -> None:
    """Puts on `new` what `old` has beyond `fresh`, a layer of its class as the constructor leaves it.

    Attributes of a weight go to the matrix that stands for it and to each of its factors, and back.

    Raises:
        UnsupportedError: it has a method replaced, an attribute whose name `new` needs, or a hook on the gradient of a
            parameter that `new` does not have.
    """
    where = name or type(old).__name__
    for hooks in _HOOKS:
        getattr(new, hooks).update({key: _bound(hook, new) for key, hook in getattr(old, hooks).items()})
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
    _keep_marks(old, new, name)


def _keep_marks(old: nn.Module, new: nn.Module, name: str) -> None:
    """Puts attributes of the parameters of `old` on what takes their place: those of a weight on matrix and factors."""
    kept = set(map(id, new.parameters()))
    weights: dict[str, nn.Parameter | KroneckerMatrix] = {
        key: child for key, child in old.named_children() if isinstance(child, KroneckerMatrix)
    }
    weights |= {key: p for key, p in old.named_parameters() if key.partition(".")[0] not in weights}
    for key, weight in weights.items():
        where = f"{name}.{key}" if name else key
        for mark, value in {} if kept.issuperset(map(id, _parameters(weight))) else _marks(weight, where).items():
            heir = getattr(new, key, None)
            holders = [heir, *_parameters(heir)] if isinstance(heir, nn.Parameter | KroneckerMatrix) else []
            if not holders or any(hasattr(holder, mark) and getattr(holder, mark) is not value for holder in holders):
                raise UnsupportedError(f"its attribute '{mark}' has no place on what it becomes", where, "Remove it")
            for holder in holders:
                setattr(holder, mark, value)


def _parameters(weight: nn.Parameter | KroneckerMatrix) -> list[nn.Parameter]:
    return list(weight.parameters()) if isinstance(weight, KroneckerMatrix) else [weight]


def _marks(weight: nn.Parameter | KroneckerMatrix, where: str) -> dict[str, Any]:
    """What a user put on a weight; on a matrix or its factors, if they agree."""
    parameters, found = _parameters(weight), dict[str, Any]()
    if any(getattr(p, hooks) for p in parameters for hooks in TENSOR_HOOKS):
        hint = "Remove it, and register it again on what the weight became"
        raise UnsupportedError("it has a hook on its gradient, and conversion replaces the weight", where, hint)
    if isinstance(weight, KroneckerMatrix):
        found = _beyond(vars(weight), vars(KroneckerMatrix(weight.structures, "meta")), {"storage"})
    for mark, value in (item for p in parameters for item in _beyond(vars(p), {}, set()).items()):
        if found.setdefault(mark, value) is not value:
            raise UnsupportedError(f"its factors differ in their attribute '{mark}'", where, "Remove it")
    return found


def _bound(hook: Any, new: nn.Module) -> Any:
    """The hook for `new`: those that get their layer hold a reference to it."""
    return type(hook)(hook.hook, new) if getattr(hook, "with_module", False) else hook


def _beyond(found: dict[str, Any], known: dict[str, Any], done: set[str]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in known and key not in _CACHES and key not in done}
