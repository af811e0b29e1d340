"""The values beside a state dict (epoch, vocabulary, hyper-parameters) as JSON and back, with their types and order.

What JSON has no type for becomes a table with the key "$": {"$": "tuple", "items": [1, 2]}.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from kruify.checkpoint import limits
from kruify.checkpoint.safe_unpickler import Global, Record, usable_key
from kruify.checkpoint.storage import TORCH_DTYPES

DIGITS = 4096
"""Bits of a whole number; Python refuses to print much longer ones."""


def to_json(value: Any, depth: int = 0) -> Any:
    """A value as what json.dumps takes.

    Raises:
        ValueError: an object of a class, a tensor, or too deep.
    """
    if depth > limits.DEPTH // 2:  # a tagged value takes two levels
        raise ValueError("depth")
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and value.bit_length() <= DIGITS):
        return value
    if kind is list:
        return [to_json(item, depth + 1) for item in value]
    if kind is dict and "$" not in value and all(type(key) is str for key in value):
        return {key: to_json(item, depth + 1) for key, item in value.items()}
    if kind in (dict, OrderedDict):
        items: Any = [[to_json(key, depth + 1), to_json(item, depth + 1)] for key, item in value.items()]
    elif kind in (tuple, torch.Size):
        items = [to_json(item, depth + 1) for item in value]
    elif kind in (set, frozenset):  # in an order that is the same in every process
        items = sorted((to_json(item, depth + 1) for item in value), key=json.dumps)
    elif kind is bytes:
        items = value.decode("latin1")
    elif kind is complex:
        items = [value.real, value.imag]
    elif kind is Global and str(value) in TORCH_DTYPES:
        return {"$": "dtype", "items": str(value)}
    elif kind is Record and str(value.cls) == "torch.device":
        return {"$": "device", "items": to_json(list(value.args), depth + 1)}
    else:
        raise ValueError(kind.__name__)
    return {"$": kind.__name__, "items": items}


def from_json(value: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: it did not come from there.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: from_json(item) for key, item in value.items()}
    return _KINDS[value["$"]](value["items"])


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    return [(_hashable(key), from_json(item)) for key, item in items]


def _hashable(key: Any) -> Any:
    made = from_json(key)
    if usable_key(made) is not made:
        raise ValueError("key")
    return made


_KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda items: dict(_pairs(items)),
    "OrderedDict": lambda items: OrderedDict(_pairs(items)),
    "tuple": lambda items: tuple(map(from_json, items)),
    "Size": torch.Size,
    "set": lambda items: set(map(_hashable, items)),
    "frozenset": lambda items: frozenset(map(_hashable, items)),
    "bytes": lambda items: items.encode("latin1"),
    "complex": lambda items: complex(*items),
    "dtype": lambda items: TORCH_DTYPES[items],
    "device": lambda items: torch.device(*items),
}
