"""Files of the first schema load, compute what they did, and are written again as the newest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kruify
from kruify.checkpoint import SCHEMA, read

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_layers_compute_what_they_did(ending: str, tmp_path: Path) -> None:
    file, saved = FOLDER / f"schema_1.{ending}", torch.load(FOLDER / "schema_1_outputs.pt")
    assert read(file).metadata["kruify.schema"] == "1"
    kruify.verify(file)
    net = torch.nn.ModuleDict(kruify.load(file))
    for name, wanted in saved["outputs"].items():
        torch.testing.assert_close(net[name](saved["input"])[0], wanted, rtol=1e-5, atol=1e-6)
    kruify.save(net, tmp_path / f"new.{ending}", seed=3)
    new, old = read(tmp_path / f"new.{ending}"), read(file)
    assert new.metadata["kruify.schema"] == str(SCHEMA)
    assert all(torch.equal(tensor, old.tensors[name]) for name, tensor in new.tensors.items())
