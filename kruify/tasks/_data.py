"""Files of installed packages, files kept in the user's cache, and splits by name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from contextlib import suppress
from pathlib import Path

from kruify.checkpoint import atomic_file
from kruify.errors import TaskError, UsageError


def find_in_package(module: str, path: str) -> Path | None:
    """Return the file or folder `path` of the installed package `module`, which is not imported."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / path).exists():
            return found
    return None


def package_file(module: str, path: str, *, hint: str) -> Path:
    """As `find_in_package`; TaskError if it is missing."""
    if found := find_in_package(module, path):
        return found
    raise TaskError(f"the Python package {module} with {path} is not installed", hint=hint)


def cache_folder() -> Path:
    """Return kruify's folder in the user's cache: $XDG_CACHE_HOME/kruify or ~/.cache/kruify."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kruify"


def keep(file: Path, content: bytes) -> None:
    """Write a file of the cache folder; a home that cannot be written to costs time, nothing else."""
    with suppress(OSError, UsageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as stream:
            stream.write(content)


def sha1(name: str) -> int:
    """Return the sha1 of `name` as a number: an order that has nothing to do with the alphabet's."""
    return int(hashlib.sha1(name.encode()).hexdigest(), 16)


def split_of(name: str, percent: int) -> str:
    """Return the split of `name`, by its sha1: `percent` % "test", as many "valid", the rest "train"."""
    part = sha1(name) % 100
    return "test" if part < percent else "valid" if part < 2 * percent else "train"
