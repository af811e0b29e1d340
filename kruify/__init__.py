"""kruify: trained RNN, LSTM and GRU checkpoints made small and fast with Kronecker Recurrent Units."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kruify.api import Inspection, convert, inspect, load, save
    from kruify.convert import densify
    from kruify.errors import KruifyError
    from kruify.finetune.penalty import unitary_penalty
    from kruify.ops import backend_info

__all__ = [
    "Inspection",
    "KruifyError",
    "backend_info",
    "convert",
    "densify",
    "inspect",
    "load",
    "save",
    "unitary_penalty",
]

# Imported when first used, because torch takes a second: `kruify --help` must not wait for it.
_HOMES = {
    "Inspection": "kruify.api",
    "KruifyError": "kruify.errors",
    "backend_info": "kruify.ops",
    "convert": "kruify.api",
    "densify": "kruify.convert",
    "inspect": "kruify.api",
    "load": "kruify.api",
    "save": "kruify.api",
    "unitary_penalty": "kruify.finetune.penalty",
}


class _Package(ModuleType):
    """`kruify.convert` is the function; importing the submodule of the same name must not put itself in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kruify' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
