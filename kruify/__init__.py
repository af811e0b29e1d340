"""kruify: trained RNN, LSTM and GRU checkpoints made small and fast with Kronecker Recurrent Units."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kruify.api import Inspection, convert, inspect, load, save
    from kruify.conversion import densify
    from kruify.errors import KruifyError
    from kruify.ops import backend_info
    from kruify.training.penalty import unitary_penalty

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
    "densify": "kruify.conversion",
    "inspect": "kruify.api",
    "load": "kruify.api",
    "save": "kruify.api",
    "unitary_penalty": "kruify.training.penalty",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kruify' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
