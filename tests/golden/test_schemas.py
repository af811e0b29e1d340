"""Files of older schemas load, compute what they did, and are written again as the newest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kruify
from kruify.checkpoint import SCHEMA, read

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("schema", "rounding", "anew"), [(1, 0.0, 0.0), (2, 2.0**-8, 0.0), (3, 2.0**-8, 0.0), (4, 0.0, 0.0), (5, 0.0, 0.14)]
)
def test_layers_compute_what_they_did(schema: int, rounding: float, anew: float, ending: str, tmp_path: Path) -> None:
    """`rounding`: relative, of what had more scales or scales of more bits; `anew`: to the largest number, of what has
    other integers when it is saved."""
    file, saved = FOLDER / f"schema_{schema}.{ending}", torch.load(FOLDER / f"schema_{schema}_outputs.pt")
    assert read(file).metadata["kruify.schema"] == str(schema)
    kruify.verify(file)
    net = torch.nn.ModuleDict(kruify.load(file))
    with torch.no_grad():
        for name, wanted in saved["outputs"].items():
            torch.testing.assert_close(net[name](saved["input"])[0], wanted, rtol=1e-5 + rounding, atol=1e-6 + rounding)
    kruify.save(net, tmp_path / f"new.{ending}", seed=3)
    new, old = read(tmp_path / f"new.{ending}"), read(file)
    assert new.metadata["kruify.schema"] == str(SCHEMA)
    for name, tensor in new.tensors.items():
        largest = float(old.tensors[name].abs().max())
        torch.testing.assert_close(tensor, old.tensors[name], rtol=rounding, atol=(rounding + anew) * largest)
