"""The metadata of a file that kruify writes: schema number, plan, source, versions, seed.

The metadata is strings only and nothing in it names something to import. No time or machine goes in: same seed,
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from kruify.errors import CorruptError, UnsupportedError

SCHEMA = 1
"""The schema that this version writes. It reads this one and all older ones."""


def kruify_version() -> str:
    """Version of the installed package, "0" in a tree that is not installed."""
    try:
        return version("kruify")
    except PackageNotFoundError:
        return "0"


def metadata_for(
    plan: str, *, source_sha256: str = "", seed: int = 0, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Metadata of a converted file.

    Args:
        plan: the plan as JSON.
        source_sha256: hash of the file that was converted.
        seed: the seed of everything random on the way.
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
        raise CorruptError("its schema number is not a positive integer", where, "Convert the source again")
    if int(text) > SCHEMA:
        raise UnsupportedError(
            f"it was written by kruify {metadata.get('kruify.version', '?')[:40]} with file schema {text}, "
            f"and this kruify {kruify_version()} reads schemas up to {SCHEMA}",
            where,
            "Upgrade kruify: pip install -U kruify",
        )
    return int(text)
