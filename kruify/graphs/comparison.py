"""A small graph beside its original in onnxruntime: what differs on random inputs, and how long both take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kruify.checkpoint.onnx_session import cpu_session
from kruify.errors import first_line

SLOWER = 1.15
"""A small graph that takes more than this many times as long as its original is said to be slower."""
REPEATS = 7
SECONDS = 2.0
"""Both are run up to `REPEATS` times in turns, within so many seconds."""
SIZES = ((1, 16, 16), (1, 1, 16), (1, 1, 1), (16, 16, 16), (1, 100, 100))
"""Of dynamic axes, tried in turn: those named like a batch, first axes, others."""
TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Timing:
    """Two graphs on the same inputs, on one core.

    Attributes:
        load_ms, run_ms: (original, small), the least of several in milliseconds.
    """

    load_ms: tuple[float, float]
    run_ms: tuple[float, float]

    @property
    def slower(self) -> bool:
        """Whether a call of the small graph takes longer than one of the original."""
        return self.run_ms[1] > SLOWER * self.run_ms[0]

    def __add__(self, other: Timing) -> Timing:
        """Of two pairs of graphs, one after the other."""
        return Timing(
            (self.load_ms[0] + other.load_ms[0], self.load_ms[1] + other.load_ms[1]),
            (self.run_ms[0] + other.run_ms[0], self.run_ms[1] + other.run_ms[1]),
        )

    def __str__(self) -> str:
        times = ", ".join(
            f"{what} {before:.3g} -> {after:.3g} ms"
            for what, (before, after) in (("loads in", self.load_ms), ("runs in", self.run_ms))
        )
        return times + ("; it is slower than the original" if self.slower else "")


@dataclass(frozen=True)
class Comparison:
    """Two graphs on random inputs.

    Attributes:
        difference: largest ||small - original|| / ||original|| of an output; None where they were not run.
        reason: why they were not run, "" where they were.
        timing: None where they were not run.
    """

    difference: float | None = None
    reason: str = ""
    timing: Timing | None = None

    def __str__(self) -> str:
        if self.difference is None:
            return f"not run beside the original: {self.reason}"
        return f"on random inputs its outputs differ by {self.difference:.2g} of their norm; {self.timing}"

    def to_json(self) -> dict[str, Any]:
        """The fields by name, those of `timing` in its place."""
        times = dict.fromkeys(("load_ms", "run_ms")) if self.timing is None else asdict(self.timing)
        return {"difference": self.difference, "reason": self.reason, **times}


def compare_graphs(original: Path, small: Path, seed: int = 0, feed: Mapping[str, Any] | None = None) -> Comparison:
    """Runs both on the same inputs.

    Args:
        feed: inputs by name; None makes random ones of the declared shapes: real numbers are standard normal, whole
            numbers and truth values 1.
    """
    try:
        sessions = [cpu_session(path) for path in (original, small)]
    except ImportError:
        return Comparison(reason="onnxruntime is not installed")
    except Exception as error:  # onnxruntime's own, of many kinds
        return Comparison(reason=f"onnxruntime cannot load it ({first_line(error)})")
    reason = ""
    for given in _feeds(sessions[0], seed) if feed is None else [feed]:
        if isinstance(given, str):
            return Comparison(reason=given)
        try:
            wanted, found = (session.run(None, given) for session in sessions)
        except Exception as error:
            reason = (
                reason or f"it does not run on {'random' if feed is None else 'these'} inputs ({first_line(error)})"
            )
            continue
        return Comparison(_difference(found, wanted), timing=time_graphs(original, small, given))
    return Comparison(reason=reason)


def time_graphs(original: Path, small: Path, feed: Mapping[str, Any]) -> Timing:
    """Loads both, which onnxruntime can, and runs them on the same inputs."""
    paths = original, small
    loads = _least_ms(*(partial(cpu_session, path) for path in paths))
    runs = [partial(cpu_session(path).run, None, feed) for path in paths]
    done = Timing(loads, _least_ms(*runs))
    if done.slower:  # or something else ran meanwhile
        again = _least_ms(*runs)
        done = Timing(loads, (min(done.run_ms[0], again[0]), min(done.run_ms[1], again[1])))
    return done


def _feeds(session: Any, seed: int) -> Iterator[dict[str, Any] | str]:
    """Inputs for several sizes of the dynamic axes; a sentence where there are none."""
    for batch, first, others in SIZES:
        numbers = np.random.default_rng(seed)
        named: dict[str, int] = {}
        feed: dict[str, Any] = {}
        for value in session.get_inputs():
            if value.type not in TYPES:
                yield f"kruify makes no random {value.type} for its input {value.name[:80]}"
                return
            shape = []
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int):
                    guess = batch if "batch" in str(size).lower() else first if axis == 0 else others
                    size = named.setdefault(size, guess) if size else guess
                shape.append(size)
            dtype = TYPES[value.type]
            real = np.issubdtype(dtype, np.floating)
            feed[value.name] = (numbers.standard_normal(shape) if real else np.ones(shape)).astype(dtype)
        yield feed


def _difference(found: list[Any], wanted: list[Any]) -> float:
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, np.ndarray) or b.dtype.kind not in "fiub":
            continue
        if a.shape != b.shape:
            return float("inf")
        a, b = (np.nan_to_num(array.astype(np.float64)) for array in (a, b))
        norm = float(np.linalg.norm(b))
        worst = max(worst, float(np.linalg.norm(a - b)) / norm if norm else float(np.linalg.norm(a) > 0))
    return worst


def _least_ms(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """The least time of each, in turns: what else the machine does only adds to it."""
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(times) < REPEATS and (not times or time.perf_counter() - begun < SECONDS):
        start = time.perf_counter()
        first()
        between = time.perf_counter()
        second()
        times.append((between - start, time.perf_counter() - between))
    return min(t[0] for t in times) * 1e3, min(t[1] for t in times) * 1e3
