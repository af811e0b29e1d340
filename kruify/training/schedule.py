"""Learning-rate schedules as pure functions of progress, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

SCHEDULES = ("onecycle", "cosine", "linear", "constant")


def lr_factor(schedule: str, progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1].

    "onecycle": half-cosine from 1/25 up to 1, then half-cosine down to 4e-6 (Smith & Topin 2018, torch's OneCycleLR).
    "cosine", "linear", "constant": linear warm-up, then down to 0 along a half-cosine, a line, or not at all.

    Args:
        warmup: share of the run spent rising.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        rise = progress / warmup
        return _between(1 / 25, 1.0, rise) if schedule == "onecycle" else rise
    fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    if schedule == "onecycle":
        return _between(1.0, 4e-6, fall)
    if schedule == "cosine":
        return _between(1.0, 0.0, fall)
    return 1.0 - fall if schedule == "linear" else 1.0


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
