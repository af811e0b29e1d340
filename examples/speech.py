"""Noisy speech for the speech enhancers of these examples.

The speech is synthetic: espeak-ng speaks sentences of a small grammar in eleven voices, with nothing above 8 kHz. The
noise is white, brown, modulated or tonal, 0 to 15 dB below the speech. The voices of the test clips are heard in no
other clip.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from kruify.tasks.phonemes.features import RATE as SPOKEN
from kruify.tasks.phonemes.sentences import sentences
from kruify.tasks.phonemes.spoken import SPEAKERS, Voice, find

Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Speech:
    """Clips, made once and kept.

    Attributes:
        folder: for the files.
        rate: samples per second, a multiple of 16,000.
        seconds: of a clip.
        counts: clips of "train" and "test".
    """

    folder: Path
    rate: int
    seconds: int
    counts: dict[str, int]

    def clips(self, split: str) -> tuple[Signal, Signal]:
        """(clean, noisy), each (clips, samples)."""
        file = self.folder / f"speech-{split}.npz"
        if not file.is_file():
            self.folder.mkdir(exist_ok=True)
            # espeak-ng keeps global state, so it speaks in a process of its own.
            numbers = (self.rate, self.seconds, self.counts[split])
            subprocess.run([sys.executable, __file__, split, *map(str, numbers), str(file)], check=True)
        with np.load(file) as arrays:
            clean, noisy = (arrays[name].astype(np.float64) / 32768 for name in ("clean", "noisy"))
        return clean, noisy


def scale_invariant_sdr(clean: Signal, estimate: Signal) -> float:
    """In dB (Le Roux et al. 2019, equation 4)."""
    target = (estimate @ clean) / (clean @ clean) * clean
    return float(10 * np.log10((target @ target) / ((target - estimate) @ (target - estimate))))


def noise(rng: np.random.Generator, kind: str, length: int, rate: int) -> Signal:
    """Of unit power: "white"; "brown"; "modulated", white that swells and fades; "tonal", a hum with harmonics."""
    white = rng.standard_normal(length)
    if kind == "brown":
        spectrum = np.fft.rfft(white)
        found = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20), length)
    elif kind == "modulated":
        found = white * (1 + np.sin(2 * np.pi * (rng.uniform(0.3, 3) * np.arange(length) / rate + rng.random())))
    elif kind == "tonal":
        phase = 2 * np.pi * rng.uniform(60, 400) * np.arange(length) / rate
        found = sum((np.sin(n * phase + 6 * rng.random()) / n for n in range(1, 9)), 0.05 * white)
    else:
        found = white
    return found / np.sqrt(np.mean(found**2))


def speak(split: str, rate: int, seconds: int, count: int, file: Path) -> None:
    """Makes the clips of a split."""
    length, seed = rate * seconds, ("train", "test").index(split)
    voices, rng, draw = Voice(find()), np.random.default_rng(seed), random.Random(seed)
    speakers = SPEAKERS["test"] if split == "test" else SPEAKERS["train"] + SPEAKERS["valid"]
    said: Any = iter(sentences(20 * count, seed=100 + seed))
    clean, noisy = [], []
    for number in range(count):
        variant, speed, pitch = speakers[number % len(speakers)], draw.randint(140, 200), draw.randint(30, 70)
        clip = np.zeros(0)
        while len(clip) < length:
            spoken = resample_poly(voices.say(next(said), variant, speed, pitch)[0] / 32768, rate // SPOKEN, 1)
            clip = np.concatenate([clip, spoken, np.zeros(rng.integers(rate // 2))])
        clip = 0.05 * clip[:length] / np.sqrt(np.mean(clip[:length] ** 2))
        kind = ("white", "brown", "modulated", "tonal")[number % 4]
        level = 0.05 * 10 ** (-rng.uniform(0, 15) / 20)
        clean.append(clip)
        noisy.append(clip + level * noise(rng, kind, length, rate))
    arrays = {"clean": np.stack(clean), "noisy": np.stack(noisy)}
    with file.open("wb") as stream:
        np.savez(stream, **{name: np.rint(32767 * np.clip(a, -1, 1)).astype(np.int16) for name, a in arrays.items()})


if __name__ == "__main__":
    speak(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
