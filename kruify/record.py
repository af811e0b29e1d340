"""What the folder of a long job knows of it, so that the job can go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kruify.checkpoint import atomic_file
from kruify.errors import UsageError


class Record:
    """One JSON file in a folder: the settings that a job began with, and what it has found so far.

    Args:
        folder: made if it is missing.
        job: "sweep" for `sweep.json`.
        settings: what may not differ between a job and its continuation; numbers, texts, lists and dicts of them.

    Attributes:
        found: what an earlier process has kept, empty for a job that begins.

    Raises:
        UsageError: the folder cannot be made, its record cannot be read, or is of a job with other settings.
    """

    def __init__(self, folder: Path, job: str, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = folder / f"{job}.json", dict(settings)
        self.found: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the folder cannot be made ({error.strerror})", folder, "Name another one") from None
        if not self.file.exists():
            self.keep()
            return
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            before = dict(data.pop("settings"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"it is no record of a {job} ({error})", self.file, "Name another folder") from None
        if different := [name for name, value in self.settings.items() if before.get(name) != value]:
            what = ", ".join(different)
            raise UsageError(f"the folder holds another {job} (other {what})", folder, "Name another folder")
        self.found = data

    def keep(self, **found: Any) -> None:
        """Add to what is known, and write it, all or nothing."""
        self.found |= found
        with atomic_file(self.file) as file:
            file.write(json.dumps({"settings": self.settings, **self.found}, indent=2).encode())
