"""The example of docs/finetuning.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kruify.training import Recipe

TEXT = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "docs/finetuning.md", "exec"), {"__name__": "example"})
    assert (tmp_path / "run" / "state.pt").is_file() and (tmp_path / "logs" / "history.csv").is_file()


def test_it_speaks_of_options_that_exist() -> None:
    options = Recipe().to_json()
    elsewhere = {"on_best", "output_kind", "stopped_early", "best_epoch", "save_seconds"}
    for name in re.findall(r"`([a-z]+_[a-z_]+)(?:=[^`]*)?`", TEXT):
        assert name in options or name in elsewhere, name
