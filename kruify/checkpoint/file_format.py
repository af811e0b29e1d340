"""The metadata of a file that kruify writes: schema number, plan, source, versions, seed; checked once, on reading.

The metadata is strings only and nothing in it names something to import. No time or machine goes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import NoneType
from typing import Any

import torch

from kruify.checkpoint.extras import from_json
from kruify.checkpoint.file_bytes import fits, parse_json, to_text
from kruify.checkpoint.parametrised import SOURCES, Computed
from kruify.checkpoint.writing import TIES
from kruify.errors import CorruptError, UnsupportedError

SCHEMA = 6
"""The schema that this version writes: 2 stores weights in fewer bits and sparse indices by rows, 3 scales as bfloat16,
4 the sum of two biases as one, one scale for each column of low rank, a compact plan, and `STORAGE` only where dtypes
do not tell it, 5 integers of four bits, 6 with steps that are not equal. All older ones can be read."""

STORAGE = "kruify.storage"
"""The metadata entry that names the weights which are stored in fewer bits than they are computed in. Without it, up
to schema 3 none are; from 4 on all that have fewer bits."""

ORIGIN = "kruify.origin"
"""The metadata entry for `origin(...)`."""

NETWORK = "kruify.network"
"""The metadata entry of `kruify train`: which of the task's networks the file holds."""

AGAIN = "Convert the source again"
NUMBER = (int, float)
JSON_ENTRIES: dict[str, Any] = {
    "kruify.plan": {str: object},
    "kruify.parents": [str],
    "kruify.history": [{str: object}],
    "kruify.recipe": {str: object},
    NETWORK: {str: (str, int)},
    STORAGE: {str: str},
    TIES: {str: str},
}
"""Metadata that is JSON, and its types."""

HISTORY: dict[str, Any] = {
    "phase": (str, NoneType),
    "epoch": NUMBER,
    "step": int,
    "loss": (*NUMBER, NoneType),
    "penalty": (*NUMBER, NoneType),
    "metrics": {str: (*NUMBER, NoneType)},
}
"""What an entry of the history has, at the least its metrics."""

ORIGIN_FIELDS: dict[str, tuple[Any, Any]] = {
    "format": (str, ""),
    "key": ((str, NoneType), None),
    "names": ({str: str}, {}),
    "order": ([str], []),
    "computed": ({str: [object]}, {}),
    "ties": ({str: str}, {}),
    "extras": ({str: object}, {}),
    "extras_before": (int, 0),
    "metadata": ({str: object}, {}),
    "shards": ({str: [str]}, {}),
    "assumed": ({str: str}, {}),
}
"""Fields of the note on the original file: types, and what an absent one stands for."""


def kruify_version() -> str:
    """Version of the installed package, "0" in a tree that is not installed."""
    try:
        return version("kruify")
    except PackageNotFoundError:
        return "0"


def metadata_for(
    plan: str,
    *,
    source_sha256: str = "",
    seed: int = 0,
    storage: Mapping[str, str] | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Metadata of a converted file.

    Args:
        plan: the plan as JSON.
        source_sha256: hash of the file that was converted.
        seed: the seed of everything random on the way.
        storage: weight -> dtype, of those that are not stored as they are computed; None where the dtypes of the
            stored tensors tell it (`stored.told_storage`).
        extra: more strings, for instance what is needed to write the original kind of file again.
    """
    metadata = {
        "kruify.schema": str(SCHEMA),
        "kruify.plan": plan,
        "kruify.source_sha256": source_sha256,
        "kruify.version": kruify_version(),
        "kruify.torch": str(torch.__version__),
        "kruify.seed": str(seed),
    }
    if storage is not None:
        metadata[STORAGE] = to_text(dict(sorted(storage.items())))
    return {**metadata, **(extra or {})}


def check_schema(metadata: Mapping[str, str], where: object) -> int | None:
    """Schema of the file, None if kruify did not write it.

    Raises:
        UnsupportedError: the schema is newer than this kruify.
        CorruptError: it is no positive integer.
    """
    text = metadata.get("kruify.schema")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise CorruptError("its schema number is not a positive integer", where, AGAIN)
    if int(text) > SCHEMA:
        raise UnsupportedError(
            f"it was written by kruify {metadata.get('kruify.version', '?')[:40]} with file schema {text}, "
            f"and this kruify {kruify_version()} reads schemas up to {SCHEMA}",
            where,
            "Upgrade kruify: pip install -U kruify",
        )
    return int(text)


def check_metadata(metadata: Mapping[str, str], where: object) -> None:
    """Refuse metadata of kruify's whose JSON is none, or has other types than its readers rely on.

    Raises:
        CorruptError: any of them. UnsafeError: nested too deeply.
    """
    for name, pattern in JSON_ENTRIES.items():
        if name in metadata and not fits(_table(metadata[name], name, where), pattern):
            raise CorruptError(f"its metadata {name} is damaged", where, AGAIN)
    for entry in _table(metadata.get("kruify.history", "[]"), "kruify.history", where):
        if "metrics" not in entry or not all(fits(entry[key], HISTORY[key]) for key in entry if key in HISTORY):
            raise CorruptError("its metadata kruify.history is damaged", where, AGAIN)
    if metadata.get(ORIGIN):
        parse_origin(metadata[ORIGIN], where)


def _table(text: str, name: str, where: object) -> Any:
    return parse_json(text, f"its metadata {name}", where, AGAIN)


def parse_origin(text: str, where: object) -> dict[str, Any]:
    """The note on the original file, every field of `ORIGIN_FIELDS` there and of its type.

    Raises:
        CorruptError: it is damaged. UnsafeError: nested too deeply.
    """
    damaged = CorruptError("its note of the original file is damaged", where, AGAIN)
    found = parse_json(text, "its note of the original file", where, AGAIN)
    if not isinstance(found, dict) or "format" not in found:
        raise damaged
    table = {name: found.get(name, default) for name, (_, default) in ORIGIN_FIELDS.items()}
    if not all(fits(table[name], pattern) for name, (pattern, _) in ORIGIN_FIELDS.items()):
        raise damaged
    if not table["format"].endswith("-sharded") and not fits(table["metadata"], {str: str}):
        raise damaged
    for name, entry in table["computed"].items():
        if len(entry) != 3 or not fits(entry[1], [str]) or not fits(entry[2], (int, NoneType)):
            raise damaged
        if entry[0] not in SOURCES or len(entry[1]) not in SOURCES[entry[0]]:
            raise damaged
        table["computed"][name] = Computed(entry[0], tuple(entry[1]), entry[2])
    try:
        made: list[Any] = []
        table["extras"] = {name: from_json(value, made) for name, value in table["extras"].items()}
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise damaged from error
    return table
