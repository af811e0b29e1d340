"""A short run of the mutation fuzzer; the long one is `python tests/checkpoint/fuzz/mutate.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MUTATE = Path(__file__).parent / "fuzz" / "mutate.py"


def test_mutated_files_are_refused_or_read_right() -> None:
    command = [sys.executable, "-W", "ignore", str(MUTATE), "--files", "165", "--meaning", "32", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-4]) > 182
