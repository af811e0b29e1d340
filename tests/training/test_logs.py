from __future__ import annotations

import builtins
import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Delay

from kruify.errors import UsageError
from kruify.training import finetune


def test_history_as_csv(tmp_path: Path) -> None:
    task = Delay()
    result = finetune(task.kronecker(), task, epochs=2, lr=1e-2, device="cpu", log_dir=tmp_path / "logs")
    with (tmp_path / "logs" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.history) == 3
    assert rows[0]["loss"] == ""
    for row, entry in zip(rows, result.history, strict=True):
        assert (row["phase"], int(row["epoch"]), int(row["step"])) == (entry.phase, entry.epoch, entry.step)
        assert float(row["valid_accuracy"]) == entry.metrics["accuracy"]
        assert float(row["penalty"]) == entry.penalty


def test_missing_tensorboard_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    task = Delay()
    with pytest.raises(UsageError, match="pip install tensorboard"):
        finetune(task.kronecker(), task, device="cpu", log_dir=tmp_path, tensorboard=True)
    with pytest.raises(UsageError, match="log-dir"):
        finetune(task.kronecker(), task, device="cpu", tensorboard=True)


def test_tensorboard_gets_every_number_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    task = Delay()
    result = finetune(task.kronecker(), task, epochs=2, lr=1e-2, device="cpu", log_dir=tmp_path, tensorboard=True)
    expected = []
    for entry in result.history:
        expected += [
            (name, getattr(entry, name), entry.step)
            for name in ("loss", "penalty", "lr")
            if getattr(entry, name) is not None
        ]
        expected += [(f"valid/{name}", value, entry.step) for name, value in entry.metrics.items()]
    assert scalars == expected
