"""The history of a run as files: CSV, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

from kruify.checkpoint import atomic_file, make_folder
from kruify.errors import UsageError
from kruify.training.result import Validation

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
        self.folder = make_folder(folder)
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError("TensorBoard is not installed", hint="pip install tensorboard") from error
            self._writer = SummaryWriter(str(self.folder))

    def write(self, history: Sequence[Validation]) -> None:
        """Bring the files up to `history`, whose last entry is new."""
        entries = [self._row(entry) for entry in history]
        metrics = sorted({f"valid_{name}" for entry in history for name in entry.metrics})
        columns = list(dict.fromkeys([*FIRST, *metrics, *(column for entry in entries for column in entry)]))
        self._csv("history.csv", [columns, *([entry.get(column) for column in columns] for entry in entries)])
        gradient = [
            (entry.epoch, layer, step, norm)
            for entry in history
            if entry.conditioning is not None
            for layer, found in entry.conditioning.gradient.items()
            for step, norm in zip(found.steps, found.norms, strict=True)
        ]
        if history[-1].conditioning is not None:
            self._csv("gradient.csv", [("epoch", "layer", "t", "gradient_norm"), *gradient])
        if self._writer is not None:
            for name, value in entries[-1].items():
                if value is not None and name not in ("phase", "epoch", "step"):
                    self._writer.add_scalar(name.replace("valid_", "valid/", 1), value, history[-1].step)
            self._writer.flush()

    @staticmethod
    def _row(entry: Validation) -> dict[str, Any]:
        """Column -> value, such as "condition_number rnn.weight_hh_l0.h"."""
        row = {name: getattr(entry, name) for name in FIRST}
        row |= {f"valid_{name}": value for name, value in entry.metrics.items()}
        matrices = entry.conditioning.matrices if entry.conditioning is not None else []
        return row | {f"{measure} {m.name}.{m.gate}": getattr(m, measure) for m in matrices for measure in MEASURES}

    def _csv(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)  # None becomes an empty cell
        with atomic_file(self.folder / name) as file:
            file.write(text.getvalue().encode())
