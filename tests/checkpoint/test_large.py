"""A checkpoint is copied one tensor at a time: memory follows the largest tensor, not the file.

The 2 GB runs are `python tests/checkpoint/fuzz/large.py`; here the same at a size that a test can take.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

LARGE = Path(__file__).parent / "fuzz" / "large.py"


@pytest.mark.parametrize("kind", ["torch", "npz"])
def test_peak_memory_follows_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    spec = importlib.util.spec_from_file_location("large", LARGE)
    assert spec and spec.loader
    large = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(large)
    large.make(tmp_path / "a", 128, 4, kind)
    command = [sys.executable, "-W", "ignore", str(LARGE), "--step", str(tmp_path / "a"), str(tmp_path / "b")]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["largest_mib"] == 32 and result["file_mib"] > 127
    assert result["written_mib"] == pytest.approx(3 * 32, abs=1)
    assert result["peak_mib"] < 1.5 * 32 + 40
