"""What the folder of a long job knows of it, so that the job can go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kruify.checkpoint import atomic_file, limits, make_folder
from kruify.checkpoint.file_bytes import parse_json
from kruify.errors import CorruptError, PlanError, UnsafeError, UsageError

Found = TypeVar("Found")
AGAIN = "Name another folder"
SCHEMA = 3  # of the file: raised when what it says means something else
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, PlanError)


class JobState:
    """One JSON file in a folder: the settings that a job began with, and what it has found so far.

    Args:
        folder: made if it is missing; None for a job that leaves no state.
        job: "sweep" for `sweep.json`.
        settings: what may not differ between a job and its continuation; numbers, texts, lists and dicts of them.

    Attributes:
        found: what an earlier process has kept, empty for a job that begins.

    Raises:
        UsageError: the folder cannot be made or written to, or its file is of a job with other settings,
            or of another version.
        CorruptError: its file cannot be read. UnsafeError: it is too long, or nested too deeply.
    """

    def __init__(self, folder: Path | None, job: str, settings: Mapping[str, Any]) -> None:
        self.file = None if folder is None else folder / f"{job}.json"
        self.job, self.settings, self.found = job, dict(settings), dict[str, Any]()
        if self.file is None:
            return
        folder = make_folder(self.file.parent)
        if not self.file.exists():
            return
        try:
            if (size := self.file.stat().st_size) > limits.JSON:
                raise UnsafeError(f"its state takes {size} bytes", self.file, AGAIN)
            data = parse_json(self.file.read_bytes(), "its state", self.file, AGAIN)
            schema, before = data.pop("schema", 1), dict(data.pop("settings"))
        except _UNREADABLE as error:
            raise self._broken(error) from None
        if schema != SCHEMA:
            raise UsageError(f"the folder holds a {job} of another version of kruify", folder, AGAIN)
        if different := [name for name, value in self.settings.items() if before.get(name) != value]:
            what = ", ".join(different)
            raise UsageError(f"the folder holds another {job} (other {what})", folder, AGAIN)
        self.found = data

    def read(self, parse: Callable[[Mapping[str, Any]], Found]) -> Found:
        """What `parse` makes of `found`.

        Raises:
            CorruptError: it cannot, for want of a key for instance.
        """
        try:
            return parse(self.found)
        except _UNREADABLE as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> CorruptError:
        return CorruptError(f"it is not the state of a {self.job} ({error!r})", self.file, AGAIN)

    def keep(self, **found: Any) -> None:
        """Add to what is known, and write it, all or nothing. From the first time on the folder is this job's."""
        self.found |= found
        if self.file is None:
            return
        with atomic_file(self.file) as file:
            file.write(json.dumps({"schema": SCHEMA, "settings": self.settings, **self.found}, indent=2).encode())
