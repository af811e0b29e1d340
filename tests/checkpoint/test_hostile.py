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
    assert len(results) >= MINIMUM


@pytest.mark.parametrize("name", list(hostile.FILES))
def test_refused(results: dict[str, dict], name: str) -> None:
    check(results[name], name)


def test_refused_where_a_library_is_needed(results: dict[str, dict]) -> None:
    for name in set(results) - set(hostile.FILES) - {"probe"}:
        check(results[name], name)


def check(result: dict, name: str) -> None:
    assert result["code"] in (3, 4), (name, result)
    assert result["events"] == [], (name, result)
    assert "\n" not in result["text"] and len(result["text"]) < 600, (name, result)
    assert name in result["text"], (name, result)
    assert not Path("/tmp/pwned").exists()


def test_the_hook_sees_what_it_is_there_for(results: dict[str, dict]) -> None:
    assert any("compile" in event for event in results["probe"]["events"])
