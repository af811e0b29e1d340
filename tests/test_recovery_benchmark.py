"""benchmarks/recovery: runs are trained, recorded once and reported, and the committed page is made of them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from kruify.conversion.locate import locate
from kruify.errors import PlanError
from kruify.tasks.loader import load_task

FOLDER = Path(__file__).parent.parent / "benchmarks" / "recovery"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("measurements", "timing", "files", "grid", "train", "latency", "report", "run")
    kept = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(FOLDER.parent)
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in names}
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_the_committed_page_is_made_of_the_committed_runs(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    read, run = modules["measurements"].read, modules["run"]
    runs = [row for task in modules["grid"].TASKS for row in read(run.runs_file(task))]
    assert len({row["run"] for row in runs}) == len(runs)
    modules["report"].write(runs, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (FOLDER / "results.md").read_text()


def test_runs_are_trained_recorded_once_and_reported(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, run = modules["grid"], modules["run"]
    monkeypatch.setattr("kruify.tasks.copy_memory.CopyMemory.drawn", {"valid": (20, 1), "test": (20, 2)})

    def named(hidden: int) -> str:
        return f"copy-memory:T=5,cell=gru,hidden={hidden},train_examples=64"

    short = {"epochs": 1, "lr": 4e-3}
    small = replace(
        grid.TASKS["jsb"], name=named(16), hidden=16, teacher=short, student=short, converged=short, smaller=named
    )
    monkeypatch.setitem(grid.TASKS, "jsb", small)
    monkeypatch.setattr(run, "HERE", tmp_path)
    wanted = ["jsb:recipe-low-rank-sparse:4", "jsb:recipe:4", "jsb:smaller:4", "jsb:recipe-pruned:4w"]
    wanted += ["jsb:converged", "jsb:bytes-smaller:1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *wanted, "--cache", str(tmp_path / "cache")])
    run.main()
    file = tmp_path / "jsb" / "runs.jsonl"
    text = file.read_text()
    rows = {row["run"]: row for row in map(json.loads, text.splitlines())}
    assert set(rows) == {"jsb/1x/dense-s0", *(grid.Run.parse(name).key for name in wanted)}
    assert all({"machine", "commit", "seed", "valid", "test", "options"} <= set(row) for row in rows.values())
    assert len(rows["jsb/4x/recipe-s0"]["candidates"]) == 3
    assert rows["jsb/4x/recipe-low-rank-sparse-s0"]["recurrent_parameters"] <= 3 * 16 * 16 / 4
    dense, smaller = rows["jsb/1x/converged-s0"], rows["jsb/1x/bytes-smaller-s0"]
    assert dense["int8"]["bytes"] > 0 < dense["rounded"]["bytes"] and smaller["options"]["epochs"] == 2
    assert smaller["bytes"] <= 4 * dense["parameters"]
    page = (tmp_path / "results.md").read_text()
    assert page.count("copy-memory") == 2 and "| magnitude pruning, default recipe, 4x (whole model) | 1 |" in page
    run.main()
    assert file.read_text() == text, "a finished run is not run again"
    monkeypatch.setattr(modules["latency"], "SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["run.py", "--latency"])
    run.main()
    (timed,) = (row for row in map(json.loads, file.read_text().splitlines()) if row["run"] == dense["run"])
    assert timed["latency_ms_per_step"]["32"] > 0 < timed["int8"]["latency_ms_per_step"]["1"]


@pytest.mark.parametrize("kind", ["low_rank_of_stack", "low_rank_and_blocks", "largest_entries"])
def test_a_structure_takes_the_bytes_that_it_may(modules: dict[str, ModuleType], kind: str) -> None:
    files, task = modules["files"], load_task("copy-memory:T=5,cell=gru,hidden=128,train_examples=64")
    dense = task.model()
    plan = getattr(files, kind)(dense, task, "size=6x")
    size = (files.PrunedSize if kind == "largest_entries" else files.FileSize)(dense.state_dict(), locate(dense).layers)
    limit = size.limit("size=6x")
    assert 0.95 * limit < size.of(plan) <= limit
    with pytest.raises(PlanError, match="no file of this kind is so small"):
        getattr(files, kind)(dense, task, "size=200x")


def test_a_method_whose_code_is_gone_is_refused(modules: dict[str, ModuleType]) -> None:
    with pytest.raises(SystemExit, match="deleted after commit"):
        modules["grid"].Run.parse("g2p:low-rank-sparse-pooled:16")
