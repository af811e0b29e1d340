"""What the showcases of published ONNX graphs share: the command, times, and the page of figures."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

REPEATS = 7


def package(name: str, install: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(install)
    return Path(spec.submodule_search_locations[0])


def compress(
    models: Sequence[Path], samples: str, budget: str, steps: int, state: Path, small: Path
) -> dict[str, float]:
    """Runs `kruify compress`, which goes on where it was interrupted; seconds of this run, and of processor time."""
    start = time.perf_counter()
    kruify = str(Path(sys.executable).with_name("kruify"))
    command = [kruify, "compress", *map(str, models), "--inputs", samples, "--budget", budget, "--steps", str(steps)]
    subprocess.run([*command, "--resume", str(state), "-o", str(small)], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": time.perf_counter() - start, "processor": used.ru_utime + used.ru_stime}


def session(model: str | Path) -> onnxruntime.InferenceSession:
    """The graph, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def least_ms(*runs: Callable[[], Any]) -> list[float]:
    """The least processor time of each in milliseconds, in turns: what else the machine does only adds to it."""
    times: list[list[float]] = []
    for _ in range(REPEATS):
        times.append([])
        for run in runs:
            start = time.process_time()
            run()
            times[-1].append(1000 * (time.process_time() - start))
    return [min(found) for found in zip(*times, strict=True)]


def keep(figures: Mapping[str, Any], file: Path) -> None:
    """Prints figures and writes them, with the commit and the cores."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    text = json.dumps({**figures, "seed": 0, "commit": commit, "cores": os.cpu_count()}, indent=1) + "\n"
    file.write_text(text)
    print(text)
