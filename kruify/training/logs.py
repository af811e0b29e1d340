"""The history of a run as files: CSV, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kruify.checkpoint.writing import atomic_file
from kruify.errors import UsageError

FIRST = ("phase", "epoch", "step", "loss", "penalty", "lr")
MEASURES = ("condition_number", "spectral_norm", "unitarity_defect")


class Logs:
    """Writes `history.csv`, and TensorBoard events if asked for, to a folder, after every validation.

    With conditioning in the history, `history.csv` has a column for each measure of each gate, and `gradient.csv` a
    line for each norm of the gradient through time.

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
        measures = [conditioning_of(entry) for entry in history]
        columns = list(dict.fromkeys(column for found in measures for column in found))
        rows: list[list[Any]] = [[*FIRST, *(f"valid_{name}" for name in names), *columns]]
        for entry, found in zip(history, measures, strict=True):
            values = [entry[key] for key in FIRST] + [entry["metrics"].get(name) for name in names]
            rows.append(values + [found.get(column) for column in columns])
        self._csv("history.csv", rows)
        if columns:
            lines = [(e["epoch"], *line) for e in history for line in _gradient_of(e)]
            self._csv("gradient.csv", [("epoch", "layer", "t", "gradient_norm"), *lines])
        if self._writer is not None:
            entry = history[-1]
            scalars = {"loss": entry["loss"], "penalty": entry["penalty"], "lr": entry["lr"]}
            scalars |= {f"valid/{name}": value for name, value in entry["metrics"].items()}
            scalars |= conditioning_of(entry)
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()

    def _csv(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            ["" if value is None else value for value in row] for row in rows
        )
        with atomic_file(self.folder / name) as file:
            file.write(text.getvalue().encode())


def conditioning_of(entry: dict[str, Any]) -> dict[str, float]:
    """The measures of one entry of a history by column, such as "condition_number rnn.weight_hh_l0.h"."""
    matrices = entry.get("conditioning", {}).get("matrices", [])
    return {f"{measure} {m['name']}.{m['gate']}": m[measure] for m in matrices for measure in MEASURES}


def _gradient_of(entry: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    for layer, found in entry.get("conditioning", {}).get("gradient", {}).items():
        for step, norm in zip(found["steps"], found["norms"], strict=True):
            yield layer, step, norm
