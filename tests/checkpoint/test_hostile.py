"""Every hostile file: refused as unsafe or corrupt, in one sentence, with nothing imported, run, opened or written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FUZZ / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hostile, harness = load("hostile"), load("harness")
MINIMUM = 90


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    paths = hostile.make(tmp_path_factory.mktemp("hostile"))
    probe = {"path": str(paths["empty.pt"]), "probe": True}
    *answers, probed = harness.open_all([*harness.jobs_for(paths.values()), probe])
    return {**dict(zip(paths, answers, strict=True)), "probe": probed}


def test_the_corpus_is_whole(results: dict[str, dict]) -> None:
    assert len(results) >= MINIMUM and set(hostile.FILES) <= set(results)


def test_refused(results: dict[str, dict]) -> None:
    wrong = {name: result for name, result in results.items() if name != "probe" and not refused(result, name)}
    assert wrong == {}
    assert not Path("/tmp/pwned").exists()


def refused(result: dict, name: str) -> bool:
    """As unsafe or corrupt, in one sentence that names the file, with nothing run."""
    text = result["text"]
    return result["code"] in (3, 4) and result["events"] == [] and "\n" not in text and len(text) < 600 and name in text


def test_the_hook_sees_what_it_is_there_for(results: dict[str, dict]) -> None:
    assert any("compile" in event for event in results["probe"]["events"])
