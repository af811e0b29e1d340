"""The history of a run as files: CSV, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from kruify.checkpoint.writing import atomic_file
from kruify.errors import UsageError

FIRST = ("phase", "epoch", "step", "loss", "penalty", "lr")


class Logs:
    """Writes `history.csv`, and TensorBoard events if asked for, to a folder, after every validation.

    The CSV file is written anew from the whole history, so a resumed run leaves the file of an uninterrupted one.

    Raises:
        UsageError: TensorBoard is asked for and not installed, or the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("the folder for logs cannot be made", folder) from error
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError("TensorBoard is not installed", hint="pip install tensorboard") from error
            self._writer = SummaryWriter(str(self.folder))

    def write(self, history: list[dict[str, Any]]) -> None:
        """Bring the files up to `history`, whose last entry is new."""
        names = sorted({name for entry in history for name in entry["metrics"]})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*FIRST, *(f"valid_{name}" for name in names)])
        for entry in history:
            values = [entry[key] for key in FIRST] + [entry["metrics"].get(name) for name in names]
            writer.writerow(["" if value is None else value for value in values])
        with atomic_file(self.folder / "history.csv") as file:
            file.write(text.getvalue().encode())
        if self._writer is not None:
            entry = history[-1]
            scalars = {"loss": entry["loss"], "penalty": entry["penalty"], "lr": entry["lr"]}
            scalars |= {f"valid/{name}": value for name, value in entry["metrics"].items()}
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()
