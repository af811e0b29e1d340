"""Features of noisy speech for DeepFilterNet3, and what its masks and filters make of the speech.

`kruify compress` calls `samples` (--inputs). What the package DeepFilterLib computes (STFT, ERB bands, their running
normalisation) is taken from it; how the outputs are applied is written out, after Schroeter et al. 2023
("DeepFilterNet: Perceptually Motivated Real-Time Speech Enhancement") and the configuration that comes with the graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import libdf
import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parent.parent))
from showcase import session
from speech import Signal, Speech

FOLDER = Path("deepfilternet3-out")
SPEECH = Speech(FOLDER, rate=48000, seconds=6, counts={"train": 64, "test": 24})
FFT, HOP, BANDS, LEAST, FILTERED = 960, 480, 32, 2, 96  # bins of a band at least; bins that are filtered
ORDER, LOOKAHEAD = 5, 2  # taps of a filter, and how many frames of them lie ahead
ALPHA = 0.99  # of the running normalisation: exp(-HOP / rate / 1 s), rounded
GRAPHS = ("enc", "erb_dec", "df_dec")
Spectrum = NDArray[np.complex64]
Feed = dict[str, NDArray[np.float32]]


def samples() -> Iterator[Feed]:
    """What the encoder is fed with, clip by clip of the train split: no labels, no clean speech. The inputs of both
    decoders are outputs of the encoder."""
    for noisy in SPEECH.clips("train")[1]:
        yield features(spectrum(noisy))


def state() -> libdf.DF:
    return libdf.DF(sr=SPEECH.rate, fft_size=FFT, hop_size=HOP, nb_bands=BANDS, min_nb_erb_freqs=LEAST)


def spectrum(clip: Signal) -> Spectrum:
    """(frames, 481) of a clip and of the silence behind it that makes up for the delay of the analysis."""
    return state().analysis(np.pad(clip, (0, FFT))[None].astype(np.float32))[0]


def features(frames: Spectrum) -> Feed:
    """The inputs of the encoder, which sees `LOOKAHEAD` frames ahead."""
    bands = libdf.erb_norm(libdf.erb(frames[None], state().erb_widths()), ALPHA)  # (1, frames, 32)
    bins = libdf.unit_norm(frames[None, :, :FILTERED].copy(), ALPHA)[0]  # (frames, 96)
    bins = np.stack([bins.real, bins.imag])[None]

    def ahead(x: NDArray[np.float32]) -> NDArray[np.float32]:
        shifted = np.zeros_like(x, dtype=np.float32)
        shifted[:, :, :-LOOKAHEAD] = x[:, :, LOOKAHEAD:]
        return shifted

    return {"feat_erb": ahead(bands[None]), "feat_spec": ahead(bins)}


class Enhancer:
    """DeepFilterNet3 from the three graphs of a folder, on one thread."""

    def __init__(self, folder: Path) -> None:
        self.sessions = [session(folder / f"{name}.onnx") for name in GRAPHS]

    def run(self, feed: Feed) -> Feed:
        """Outputs of all three."""
        known = dict(feed)
        for graph in self.sessions:
            given = {value.name: known[value.name] for value in graph.get_inputs()}
            known |= dict(zip((value.name for value in graph.get_outputs()), graph.run(None, given), strict=True))
        return known

    def enhanced(self, clip: Signal) -> Signal:
        """The clip with mask and filters applied."""
        frames = spectrum(clip)
        found = self.run(features(frames))
        masked = frames * np.repeat(found["m"][0, 0], state().erb_widths().astype(int), axis=1)
        taps = found["coefs"][0].reshape(-1, FILTERED, ORDER, 2)
        taps = taps[..., 0] + 1j * taps[..., 1]
        around = np.pad(frames[:, :FILTERED], ((ORDER - 1 - LOOKAHEAD, LOOKAHEAD), (0, 0)))
        around = np.lib.stride_tricks.sliding_window_view(around, ORDER, axis=0)  # (frames, 96, 5)
        masked[:, :FILTERED] = (around * taps).sum(-1)
        sound = state().synthesis(masked[None].astype(np.complex64))[0]
        return sound[FFT - HOP :][: len(clip)].astype(np.float64)
