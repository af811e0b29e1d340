"""The state of a run on disk: everything that the next step depends on, in one file that is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint.file_bytes import parsed
from kruify.checkpoint.writing import atomic_file, save_tree
from kruify.errors import CorruptError, KruifyError, UsageError
from kruify.training.result import Validation

FORMAT = 2
FILE = "state.pt"


@dataclass
class Best:
    """The weights that validated best so far, on the CPU."""

    epoch: int
    metrics: dict[str, float]
    weights: dict[str, Tensor]


@dataclass
class RunState:
    """Where a run stands, but for the current weights and the optimiser's moments.

    Attributes:
        phase: index of the current phase.
        step: optimiser steps done in it.
        stale: validations since the best one.
        loss_sum, weight_sum: over the current epoch, of the batches' losses by their weights.
        skipped: steps in a row, up to now, without a finite gradient.
        alone: whether the network is better than its teacher and learns without it.
        scales: of `rounded_weights`, {} before rounding begins.
        seconds: time spent.
    """

    phase: int = 0
    step: int = 0
    history: list[Validation] = field(default_factory=list)
    best: Best | None = None
    stale: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    alone: bool = False
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Saved:
    """What the file holds.

    Attributes:
        run: what may not differ between a run and its continuation: recipe, shapes of the parameters, batches, storage.
        moments: the optimiser's state by the number of the parameter; None between two phases.
    """

    run: dict[str, Any]
    state: RunState
    model: dict[str, Tensor]
    moments: dict[int, Any] | None


def save(folder: Path, saved: Saved) -> None:
    """Write to `folder`, all or nothing."""
    with atomic_file(folder / FILE) as file:
        save_tree({"format": FORMAT, **_plain(saved)}, file)


def load(folder: Path, run: Mapping[str, Any]) -> Saved | None:
    """What is in `folder`, None where no run has begun there yet.

    Raises:
        CorruptError: the file cannot be read, or does not hold the state of a run.
        UsageError: another version of kruify wrote it, or it is of another run than `run`.
    """
    if not (folder / FILE).exists():
        return None
    with checked(folder):
        found = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        if found.pop("format") != FORMAT:
            raise UsageError("another version of kruify began this run", folder, "Name an empty folder")
        _check_same(folder, found["run"], run)
        saved: Saved = parsed(Saved, found)
        return saved


@contextmanager
def checked(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside, the file is the reason: every error becomes a CorruptError."""
    try:
        yield
    except KruifyError:
        raise
    except Exception as error:
        what = f"the state of the run cannot be read ({type(error).__name__}: {error})"
        raise CorruptError(what, folder / FILE, "Name an empty folder to start over") from error


def _check_same(folder: Path, before: dict[str, Any], now: Mapping[str, Any]) -> None:
    """A run can be continued only with the options and on the network that it began with; UsageError otherwise."""
    if unknown := before["recipe"].keys() - now["recipe"].keys():
        what = f"the run in this folder began with the option '{min(unknown)}', which this version does not have"
        raise UsageError(what, folder, "Name an empty folder")
    for name, value in now["recipe"].items():
        if before["recipe"][name] != value:
            what = f"the run in this folder began with {name}={before['recipe'][name]}, not {value}"
            raise UsageError(what, folder, f"Resume with {name}={before['recipe'][name]}, or name an empty folder")
    for name in sorted({**before["shapes"], **now["shapes"]}):
        if before["shapes"].get(name) != now["shapes"].get(name):
            what = f"the run in this folder was of another network ({name} differs)"
            raise UsageError(what, folder, "Name an empty folder")
    if before.get("storage", now["storage"]) != now["storage"]:  # older runs do not tell
        raise UsageError(
            "the run in this folder was of weights stored as another dtype", folder, "Give the same --dtype"
        )
    if before["batches"] != now["batches"]:
        raise UsageError("the task's batches or the number of processes changed since this run began", folder)
    if before["teacher"] != now["teacher"]:
        raise UsageError("the run in this folder had a teacher, or had none", folder, "Give the same --teacher")


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, at every depth; tensors and state dicts as they are."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
