"""The README's picture and table follow from the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "headline.py"


@pytest.fixture(scope="module")
def headline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("headline", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(method: str, seed: int, valid: float, test: float, epochs: int = 5, size: int = 24576) -> dict[str, Any]:
    return {
        "run": f"g2p/16x/{method}-{epochs}ep-s{seed}",
        "method": method,
        "metric": "wer",
        "higher_is_better": False,
        "valid": {"wer": valid},
        "test": {"wer": test},
        "recurrent_parameters": size,
        "options": {"epochs": epochs},
    }


def test_runs_are_chosen_by_the_validation_split(headline: ModuleType) -> None:
    runs = [
        run_of("low-rank-sparse", 0, 0.50, 0.40),
        run_of("low-rank-sparse", 0, 0.45, 0.44, epochs=12),
        run_of("low-rank-sparse", 1, 0.47, 0.46, epochs=12),
        run_of("low-rank", 0, 0.55, 0.54),
        run_of("recipe-low-rank", 0, 0.53, 0.52),  # trained in another way, the same structure
        run_of("recipe-random", 0, 0.10, 0.10),
        run_of("low-rank-sparse-anneal", 0, 0.48, 0.30),
        run_of("random", 0, 0.10, 0.10),  # a control, in no series
        run_of("dense", 0, 0.40, 0.41, size=393216),
    ]
    found = headline.chosen(runs)
    assert {name: list(sizes) for name, sizes in found.items()} == {
        "kruify": [24576],
        "low rank": [24576],
        headline.DENSE: [393216],
    }
    assert [e["test"]["wer"] for e in found["kruify"][24576]] == [0.44, 0.46]
    assert [e["test"]["wer"] for e in found["low rank"][24576]] == [0.52]
    assert headline.series_of("recipe") == "kruify"


def test_accuracy_in_the_table_is_the_mean_over_seeds(headline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of("kron", seed, 0.45, 0.44 + 0.02 * seed) for seed in (0, 1)]
    dense = [run_of("dense", 0, 0.43, 0.42, size=393216), run_of("dense-longer", 0, 0.42, 0.41, size=393216)]
    monkeypatch.setattr(headline, "runs", lambda: runs + dense)
    assert (
        "5 passes after conversion, 2 seeds | 0.410 | 0.450 | recurrent matrices **16x smaller** |" in headline.table()
    )


def test_table_and_picture_hold_the_results(headline: ModuleType) -> None:
    about, *rows = map(json.loads, (FILE.parent / "results" / "cpu_layers.jsonl").read_text().splitlines())
    assert about["machine"]["commit"]
    (row,) = (
        r for r in rows
        if (r["kind"], r["hidden"], r["batch"], r["threads"], r["what"], r["spec"], r["inputs"])
        == ("lstm", 1024, 1, 1, "forward", "auto", 128)
    )  # fmt: skip
    times = row["ms"]["dense"] / row["ms"]["kruify"]
    table = headline.table()
    assert f"**{times:.2g}x faster**" in table
    pytest.importorskip("matplotlib")
    picture = headline.draw()
    assert f">{times:.0f}<" in picture and picture == headline.draw()
    assert "prefers-color-scheme" not in picture and "#ffffff" in picture  # the same on light and dark pages


def test_the_table_goes_between_its_marks(headline: ModuleType) -> None:
    text = "a\n<!-- headline -->\nold\n<!-- /headline -->\nb"
    new = headline.MARKS.sub(lambda match: match[1] + "new\n" + match[2], text)
    assert new == "a\n<!-- headline -->\nnew\n<!-- /headline -->\nb"
    assert headline.MARKS.search(headline.README.read_text(encoding="utf-8"))


def test_numbers_have_no_exponent(headline: ModuleType) -> None:
    assert [headline.number(x) for x in (0.7033, 25.31, 1130.0)] == ["0.703", "25.3", "1130"]
