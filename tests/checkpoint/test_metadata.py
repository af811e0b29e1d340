"""Metadata of kruify's that are damaged: refused on reading, in one sentence, before any command works with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from kruify.checkpoint import ORIGIN, metadata_for, read, write_model
from kruify.errors import CorruptError, KruifyError, UnsafeError

PLAN = json.dumps({"schema": 1, "layers": []})
DEEP = "[" * 200 + "]" * 200
GOOD = {
    "kruify.parents": json.dumps(["ab" * 32]),
    "kruify.history": json.dumps([{"phase": "a", "epoch": 1, "step": 2, "loss": None, "metrics": {"loss": 0.5}}]),
    "kruify.recipe": json.dumps({"epochs": 3}),
    "kruify.network": json.dumps({"cell": "lstm", "hidden": 8}),
    ORIGIN: json.dumps({"format": "torch", "key": "model", "extras": {"epoch": 3}, "names": {"a": "module.a"}}),
}
BAD = {
    "kruify.parents": ["{", "{}", "[1]", "null", '["a", ["b"]]'],
    "kruify.history": ["{", "{}", '["a"]', "[{}]", '[{"metrics": {"a": "b"}}]', '[{"metrics": {}, "epoch": "1"}]'],
    "kruify.recipe": ["[]", "1"],
    "kruify.network": ['{"hidden": [1]}', "[]"],
    ORIGIN: [
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": "torch", "names": {"a": 1}}',
        '{"format": "torch", "order": {}}',
        '{"format": "torch", "computed": {"a": ["weight_norm", ["a"], 0]}}',
        '{"format": "torch", "computed": {"a": ["os.system", ["a", "b"], 0]}}',
        '{"format": "torch", "ties": []}',
        '{"format": "torch", "shards": {"a": "b"}}',
        '{"format": "safetensors", "metadata": {"a": 1}}',
    ],
}


def written(path: Path, extra: dict[str, str]) -> Path:
    write_model(path, {"w": torch.ones(2, 2)}, metadata_for(PLAN, extra=extra))
    return path


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_good_metadata_are_read(tmp_path: Path, ending: str) -> None:
    found = read(written(tmp_path / f"a.{ending}", GOOD)).metadata
    assert {name: found[name] for name in GOOD} == GOOD


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_damaged_metadata_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(CorruptError):
        read(written(tmp_path / "a.safetensors", {**GOOD, name: text}))


@pytest.mark.parametrize("name", [*GOOD, "kruify.plan"])
def test_deep_metadata_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeError, match="nested"):
        read(written(tmp_path / "a.safetensors", {**GOOD, name: DEEP}))


def test_metadata_of_a_pt_file_are_text(tmp_path: Path) -> None:
    metadata: dict = {**metadata_for(PLAN), "kruify.seed": 7}
    torch.save({"state_dict": {"w": torch.ones(2)}, "kruify": metadata}, tmp_path / "a.pt")
    with pytest.raises(CorruptError, match="metadata"):
        read(tmp_path / "a.pt")


def test_mutated_metadata_are_read_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(300):
        name = draw.choice(list(GOOD))
        text = list(GOOD[name])
        for _ in range(draw.randint(1, 3)):
            text[draw.randrange(len(text))] = draw.choice('{}[]",:0-1.en\\u')
        try:
            read(written(tmp_path / "a.safetensors", {**GOOD, name: "".join(text)}))
        except KruifyError as error:
            assert error.exit_code in (3, 4) and "\n" not in str(error)
