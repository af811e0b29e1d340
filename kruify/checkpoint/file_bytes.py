"""Bytes of a file: in chunks, at a place, as JSON; plain data as what it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

from kruify.checkpoint import limits
from kruify.errors import CorruptError, UnsafeError

CHUNK = 1 << 22
AGAIN = "Copy or download it again"


def chunks(file: BinaryIO, count: int | None = None) -> Iterator[bytes]:
    """The next `count` bytes of a file, all that follow by default, at most 4 MiB at a time."""
    while (count is None or count > 0) and (chunk := file.read(CHUNK if count is None else min(count, CHUNK))):
        count = None if count is None else count - len(chunk)
        yield chunk


def read_at(path: Path, file: BinaryIO, start: int, count: int) -> bytearray:
    """Exactly `count` bytes from `start` on.

    Raises:
        CorruptError: the file has become shorter.
    """
    data = bytearray(count)
    file.seek(start)
    if file.readinto(data) != count:  # type: ignore[attr-defined]
        raise CorruptError("it became shorter while it was read", path, "Do not write to it meanwhile")
    return data


def to_text(value: Any) -> str:
    """JSON for the header of a file: no space between its parts."""
    return json.dumps(value, separators=(",", ":"))


def parse_json(data: bytes | str, what: str, path: object, hint: str = AGAIN) -> Any:
    """JSON in UTF-8 in which no table has a key twice.

    Raises:
        CorruptError: it is something else. UnsafeError: it is too long, or nested too deeply.
    """
    if len(data) > limits.JSON:
        raise UnsafeError(f"{what} takes {len(data)} bytes", path)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")  # json itself would guess at other encodings
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise UnsafeError(f"{what} is nested too deeply", path) from error
    except ValueError as error:
        raise CorruptError(f"{what} is no JSON ({str(error)[:100]})", path, hint) from error
    level = [value]
    for _ in range(limits.DEPTH):
        containers = [node for node in level if isinstance(node, dict | list)]
        level = [item for node in containers for item in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value
    raise UnsafeError(f"{what} is nested too deeply", path)


def fits(value: Any, pattern: Any) -> bool:
    """Whether a JSON value has the types of a pattern: a type, (one, or another), [of these], {str: of these}.

    >>> fits({"a": [1]}, {str: [int]}), fits(True, int)
    (True, False)
    """
    if isinstance(pattern, tuple):
        return any(fits(value, one) for one in pattern)
    if isinstance(pattern, list):
        return isinstance(value, list) and all(fits(item, pattern[0]) for item in value)
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(fits(item, pattern[str]) for item in value.values())
    return pattern is object or type(value) is pattern


def parsed(hint: Any, value: Any) -> Any:
    """Plain data as an instance of the type `hint`, dataclasses from dicts; TypeError where `value` holds none."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        return hint(**{name: parsed(hints.get(name), item) for name, item in value.items()})  # type: ignore[operator]
    if origin is UnionType:
        return None if value is None else parsed(inner[0], value)
    if origin is dict and isinstance(value, dict):
        return {parsed(inner[0], key): parsed(inner[1], item) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [parsed(inner[0], item) for item in value]
    if origin is not None or (hint is not Any and not isinstance(value, hint)):
        raise TypeError(f"a {type(value).__name__} instead of {hint}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name appears twice")
    return table
