"""benchmarks/: every script can be imported, and several processes may record their rows in one file."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def test_every_script_can_be_imported() -> None:
    for script in FOLDER.glob("*.py"):
        importlib.import_module(script.stem)


def _store(file: Path, first: int) -> None:
    sys.path.insert(0, str(FOLDER))
    store = importlib.import_module("measurements").store
    for number in range(first, first + 20):
        store(file, {"run": str(number), "value": number}, "run")


def test_processes_write_to_one_file_together(tmp_path: Path) -> None:
    measurements = importlib.import_module("measurements")
    file = tmp_path / "runs.jsonl"
    # 5 to 24 and 15 to 34: what both write stands there once.
    processes = [multiprocessing.get_context("spawn").Process(target=_store, args=(file, first)) for first in (5, 15)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(row["value"] for row in measurements.read(file)) == list(range(5, 35))
    measurements.store(file, {"run": "7", "value": 0}, "run")
    assert [row["value"] for row in measurements.read(file) if row["run"] == "7"] == [0]
