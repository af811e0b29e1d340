"""Where the files of an installed package lie, and what is made of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kruify.errors import TaskError


def package_file(module: str, path: str, *, hint: str) -> Path:
    """Return the file `path` of the installed package `module`, which is not imported; TaskError if it is missing."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / path).is_file():
            return file
    raise TaskError(f"the Python package {module} with {path} is not installed", hint=hint)


def cache_folder() -> Path:
    """Return kruify's folder in the user's cache: $XDG_CACHE_HOME/kruify or ~/.cache/kruify."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kruify"
