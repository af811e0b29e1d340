"""The values beside a state dict (epoch, vocabulary, hyper-parameters) as JSON and back, with their types and order.

What JSON has no type for becomes a table with the key "$": {"$": "tuple", "items": [1, 2]}. A list or dict that stands
in several places is {"$": "same", "items": N} from the second on: the one that is N-th to begin, from 0.
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


def to_json(value: Any, seen: dict[int, int] | None = None, depth: int = 0) -> Any:
    """A value as what json.dumps takes.

    Args:
        seen: number of every list, dict and bytearray by its id, for values that are to be read with one `made`.

    Raises:
        ValueError: an object of a class, a tensor, or too deep.
    """
    if depth > limits.DEPTH // 2:  # a tagged value takes two levels
        raise ValueError("depth")
    seen, kind = {} if seen is None else seen, type(value)
    if kind in (list, dict, OrderedDict, bytearray):
        if id(value) in seen:
            return {"$": "same", "items": seen[id(value)]}
        seen[id(value)] = len(seen)
    if value is None or kind in (bool, str, float) or (kind is int and value.bit_length() <= DIGITS):
        return value
    if kind is list:
        return [to_json(item, seen, depth + 1) for item in value]
    if kind is dict and "$" not in value and all(type(key) is str for key in value):
        return {key: to_json(item, seen, depth + 1) for key, item in value.items()}
    if kind in (dict, OrderedDict):
        items: Any = [[to_json(key, seen, depth + 1), to_json(item, seen, depth + 1)] for key, item in value.items()]
    elif kind in (tuple, torch.Size):
        items = [to_json(item, seen, depth + 1) for item in value]
    elif kind in (set, frozenset):  # in an order that is the same in every process
        items = sorted((to_json(item, seen, depth + 1) for item in value), key=json.dumps)
    elif kind in (bytes, bytearray):
        items = value.decode("latin1")
    elif kind is complex:
        items = [value.real, value.imag]
    elif kind is range:
        items = [to_json(number) for number in (value.start, value.stop, value.step)]
    elif kind is Global and str(value) in TORCH_DTYPES:
        return {"$": "dtype", "items": str(value)}
    elif kind is Record and str(value.cls) == "torch.device":
        return {"$": "device", "items": [to_json(item) for item in value.args]}
    else:
        raise ValueError(kind.__name__)
    return {"$": kind.__name__, "items": items}


def from_json(value: Any, made: list[Any] | None = None) -> Any:
    """The inverse of `to_json`.

    Args:
        made: gets every list, dict and bytearray, None as long as it is not complete.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError: it did not come from there.
    """
    made = [] if made is None else made
    kind: str
    items: Any
    if isinstance(value, list):
        kind, items = "list", value
    elif not isinstance(value, dict):
        return value
    else:
        kind, items = (value["$"], value["items"]) if "$" in value else ("table", value)
    if kind == "same":
        if type(items) is not int or items < 0 or made[items] is None:
            raise ValueError("same")
        return made[items]
    place = len(made)
    if kind in _NUMBERED:
        made.append(None)
    found = _KINDS[kind](items, made)
    if kind in _NUMBERED:
        made[place] = found
    return found


def _hashable(key: Any) -> Any:
    made = from_json(key)
    if usable_key(made) is not made:
        raise ValueError("key")
    return made


def _pairs(items: Any, made: list[Any]) -> list[tuple[Any, Any]]:
    return [(_hashable(key), from_json(item, made)) for key, item in items]


_NUMBERED = ("list", "table", "dict", "OrderedDict", "bytearray")
_KINDS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "list": lambda items, made: [from_json(item, made) for item in items],
    "table": lambda items, made: {key: from_json(item, made) for key, item in items.items()},
    "dict": lambda items, made: dict(_pairs(items, made)),
    "OrderedDict": lambda items, made: OrderedDict(_pairs(items, made)),
    "tuple": lambda items, made: tuple([from_json(item, made) for item in items]),
    "Size": lambda items, made: torch.Size(items),
    "set": lambda items, made: set(map(_hashable, items)),
    "frozenset": lambda items, made: frozenset(map(_hashable, items)),
    "bytes": lambda items, made: items.encode("latin1"),
    "bytearray": lambda items, made: bytearray(items.encode("latin1")),
    "complex": lambda items, made: complex(*items),
    "range": lambda items, made: range(*items),
    "dtype": lambda items, made: TORCH_DTYPES[items],
    "device": lambda items, made: torch.device(*items),
}
