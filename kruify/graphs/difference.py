"""How far the outputs of one graph are from those of another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Difference:
    """Of one output, over all samples.

    Attributes:
        relative_error: ||other - original|| / ||original||.
        snr_db: the same in decibels, -20 log10 of it.
        agreement: share of the positions along all axes but the last at which both are largest at the same index; None
            where the last axis has one entry.
    """

    relative_error: float
    snr_db: float
    agreement: float | None


class DifferenceSums:
    """Adds up the differences of two graphs, sample by sample."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, original: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> None:
        """The outputs of both for one sample, by name; those that are no numbers are passed over."""
        for name, one in original.items():
            if one.dtype.kind not in "fiu":
                continue
            a, b = one.astype(np.float64), other[name].astype(np.float64)
            same = count = 0
            if a.shape != b.shape:  # a graph that decides how much it gives
                b = np.zeros_like(a)
            if a.ndim and a.shape[-1] > 1:
                found = a.argmax(-1) == b.argmax(-1)
                same, count = int(found.sum()), found.size
            sums = np.array([np.square(b - a).sum(), np.square(a).sum(), same, count])
            self._sums[name] = self._sums.get(name, np.zeros(4)) + sums

    def differences(self) -> dict[str, Difference]:
        """Output -> difference."""
        found = {}
        for name, (wrong, whole, same, count) in self._sums.items():
            error = math.sqrt(wrong / whole) if whole else math.inf if wrong else 0.0
            snr = -20 * math.log10(error) if 0 < error < math.inf else math.inf if not error else -math.inf
            found[name] = Difference(error, snr, float(same / count) if count else None)
        return found
