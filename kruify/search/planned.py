"""What samples and a budget choose before anything is trained, and how long the training will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kruify.conversion.result import Conversion
from kruify.progress import Progress

MEASURED = 0.05
"""Share of the steps of the first layer after which the time is known; a layer is validated as often."""


@dataclass(frozen=True)
class Planned:
    """What becomes of the layers of graphs, or of a program.

    Attributes:
        conversion: of all of them, before they are trained; without tensors.
        skipped: recurrent layers, and matrices of the others, that stay dense, and why.
        untrained: layers that are fitted to their weights alone, and why.
    """

    conversion: Conversion
    skipped: dict[str, str]
    untrained: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As of `kruify convert` and `inspect`."""
        told = self.conversion.to_json()
        named = {"skipped": self.skipped, "untrained": self.untrained}
        return {
            **{key: told[key] for key in ("matrices", "parameters", "bytes", "budget")},
            **{key: [{"name": n, "reason": why} for n, why in found.items()] for key, found in named.items()},
        }


class TimeKnown(Exception):
    """Ends a training that was begun only to see how long it takes."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class TrainingTime:
    """Progress of layers that are trained one after the other, which tells once how long it all takes from there.

    What it takes before the first step of a layer, above all to record what the layer is called with, counts for each.

    Args:
        progress: what is told everything, too.
        steps: of each layer.
        more: training that follows, in units of what the steps of all layers take.
        tell: called with seconds.
    """

    def __init__(
        self, progress: Progress | None, steps: int, more: float, tell: Callable[[float], None] | None
    ) -> None:
        self._progress, self._steps, self._more, self._tell = progress, steps, more, tell
        self._begun, self._first = time.monotonic(), (0.0, 0.0)

    def __call__(self, done: float, total: float, phase: str, /) -> None:
        if self._progress is not None:
            self._progress(done, total, phase)
        if self._tell is None or not phase.startswith("layer "):
            return
        now = time.monotonic()
        if not self._first[0]:
            self._first = done, now
        steps = done - self._first[0]
        if steps >= max(1.0, MEASURED * self._steps):
            pace, before = (now - self._first[1]) / steps, self._first[1] - self._begun
            runs = (total - done) // self._steps + (self._more > 0)
            tell, self._tell = self._tell, None
            tell(pace * (total - done + self._more * total) + runs * before)


def seconds_of(train: Callable[[Progress], object], progress: Progress | None, steps: int, more: float) -> float | None:
    """How long a training takes, as `TrainingTime` tells it: it is begun, and ended then; None where there is none.

    Args:
        train: trains layers, and is called with its progress.
    """

    def end(seconds: float) -> None:
        raise TimeKnown(seconds)

    try:
        train(TrainingTime(progress, steps, more, end))
    except TimeKnown as known:
        return known.seconds
    return None
