"""What a frame of speech is described by: log energies of mel bands, and how they change (Davis & Mermelstein 1980;
Furui 1986; 40 bands and energy with first and second differences as in Graves, Mohamed & Hinton 2013)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

RATE = 16_000  # samples per second
HOP, WINDOW, FFT = 160, 400, 512  # samples: a frame of 25 ms every 10 ms
BANDS = 40
STATIC = BANDS + 1
FEATURES = 3 * STATIC
_FLOOR = 1.0  # of a band's energy, of samples in [-32768, 32767]


def log_mel(samples: NDArray[np.int16]) -> NDArray[np.float32]:  # (n,) -> (frames, 41)
    """Return the log energies of 40 mel bands and of the whole frame; frames that do not fit are left out."""
    x = samples.astype(np.float64)
    x = np.append(x[:1], x[1:] - 0.97 * x[:-1])
    if len(x) < WINDOW:
        x = np.pad(x, (0, WINDOW - len(x)))
    frames = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[::HOP] * np.hamming(WINDOW)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2
    energies = np.concatenate([power @ _filters().T, (frames**2).sum(1, keepdims=True)], axis=1)
    logs: NDArray[np.float32] = np.log(np.maximum(energies, _FLOOR)).astype(np.float32)
    return logs


@cache
def _filters() -> NDArray[np.float64]:  # (40, 257)
    """Triangles that overlap by half, equally wide in mel, from 0 to 8000 Hz."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, BANDS + 2) / 2595) - 1)
    hertz = np.arange(FFT // 2 + 1) * RATE / FFT
    rising = (hertz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hertz) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def frame_labels(
    bounds: list[tuple[int, int]],  # (first sample, class), ascending
    frames: int,
) -> NDArray[np.int64]:
    """Return the class of each frame: what is spoken in the middle of it; the first class before the first sample."""
    middles = np.arange(frames) * HOP + WINDOW // 2
    starts = np.array([start for start, _ in bounds])
    at = np.searchsorted(starts, middles, side="right") - 1
    return np.array([label for _, label in bounds], dtype=np.int64)[np.maximum(at, 0)]


def with_differences(
    static: Tensor,  # (frames, 41)
) -> Tensor:  # (frames, 123)
    """The features, their first and their second differences: regression over two frames on each side."""
    first = _difference(static)
    return torch.cat([static, first, _difference(first)], dim=1)


def _difference(x: Tensor) -> Tensor:  # (frames, n) -> (frames, n)
    weights = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=x.dtype) / 10
    columns = functional.pad(x.T[:, None], (2, 2), mode="replicate")
    return functional.conv1d(columns, weights[None, None])[:, 0].T
