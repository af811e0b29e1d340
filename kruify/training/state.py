"""The state of a run on disk: everything that the next step depends on, in one file that is whole or not there."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from kruify.checkpoint.writing import atomic_file, save_tree
from kruify.errors import CorruptError, UsageError
from kruify.training.recipe import Recipe

FORMAT = 1
FILE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` to `folder`, all or nothing."""
    with atomic_file(folder / FILE) as file:
        save_tree({"format": FORMAT, **state}, file)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state in `folder`, None where no run has begun there yet.

    Raises:
        CorruptError: the file cannot be read.
        UsageError: another version of kruify wrote it.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError, zipfile.BadZipFile) as error:
        raise CorruptError("the state of the run cannot be read", path, "Delete it to start over") from error
    if state.get("format") != FORMAT:
        raise UsageError(
            "another version of kruify wrote this state", path, "Delete it to start over, or use that version"
        )
    return state


def check_same_run(folder: Path, saved: dict[str, Any], recipe: Recipe, shapes: dict[str, list[int]]) -> None:
    """A run can be continued only with the options and on the network that it began with.

    Raises:
        UsageError: an option or a shape differs; the text names the first.
    """
    for name, value in recipe.to_json().items():
        before = saved["recipe"].get(name)
        if name not in Recipe.FREE and before != value:
            hint = f"Resume with {name}={before}, or name an empty folder"
            raise UsageError(f"the run in this folder began with {name}={before}, not {value}", folder, hint)
    if saved["shapes"] != shapes:
        names = sorted(set(saved["shapes"]) ^ set(shapes)) or [n for n in shapes if saved["shapes"][n] != shapes[n]]
        raise UsageError(
            f"the run in this folder was of another network ({names[0]} differs)", folder, "Name an empty folder"
        )
