"""The rows of benchmarks/paper: the networks that they say, a short run, and the table made of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kruify.analysis.counts import count_network

FOLDER = Path(__file__).parent.parent / "benchmarks" / "paper"
GENERATED = ("copy-memory", "adding")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("measurements", "rows", "report", "run")
    kept = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(FOLDER.parent)
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in names}
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_the_networks_are_those_of_the_issue(modules: dict[str, ModuleType]) -> None:
    rows = modules["rows"]
    sizes = {}
    for row in rows.ROWS:
        assert row.table in rows.TABLES
        if row.task.startswith(GENERATED):
            task = rows.task_of(row)
            sizes[row.key] = rows.size_of(task), count_network(task.model()).recurrent
    assert sizes["copy-1000-kru"][1] == 8 * 7  # 8 log2 N real numbers
    assert sizes["adding-750-kru"][1] == 8 * 7
    for row in rows.ROWS:
        if row.key in sizes and row.like:
            unit = 0.02 if sizes[row.like][0] > 2000 else 0.07  # of a small network one LSTM unit is more than 2 %
            assert abs(sizes[row.key][0] / sizes[row.like][0] - 1) < unit, row.key
    assert rows.memoryless(1000) == pytest.approx(0.0294, abs=5e-5)
    with pytest.raises(SystemExit, match="there is no row copy"):
        rows.row_of("copy")


def test_a_row_is_trained_recorded_and_reported(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, run = modules["rows"], modules["run"]
    monkeypatch.setattr("kruify.tasks.copy_memory.CopyMemory.drawn", {"valid": (20, 1), "test": (20, 2)})
    small = rows.Row("copy-1000-kru", "copy-1000", "KRU", "copy-memory:T=5,train_examples=200", "kru", 8, 40)
    monkeypatch.setattr(run, "row_of", lambda key: small)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(run, "HERE", tmp_path)
    command = ["run.py", "copy-1000-kru", "--fraction", "0.5", "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    text = (tmp_path / "runs.jsonl").read_text()
    found = json.loads(text)
    assert found["run"] == "copy-1000-kru-0.5-s0"
    assert (found["steps"], found["all_steps"], found["fraction"]) == (20, 40, 0.5)
    assert found["recurrent_parameters"] == 8 * 3
    assert {"machine", "commit", "seed", "seconds", "date"} <= set(found)
    condition = found["condition_number"]
    assert condition["start"] == pytest.approx(1, abs=1e-3)  # a unitary start
    assert condition["largest"] >= max(condition["start"], condition["end"])
    page = (tmp_path / "results.md").read_text()
    assert "20 (50% of 40)" in page and "| no |" in page and "Not run yet." in page
    run.main()
    assert (tmp_path / "runs.jsonl").read_text() == text, "a finished row is not run again"


def test_published_figures_have_a_source(modules: dict[str, ModuleType]) -> None:
    published = [item for table in modules["rows"].TABLES.values() for item in table.published]
    assert published and all(source for _, _, source in published)
