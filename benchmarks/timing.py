"""Interleaved timing: every contender runs in turn, many times, and the best time of each counts. A turn is some
milliseconds of calls, so that weights are in the caches as they are where one network runs all the time.

Other load on the machine slows all contenders alike, so ratios within a row hold where absolute times do not.
On one thread the clock is the processor time of the process, which does not run while others have the core; of all its
threads, as OpenVINO computes in one of its own.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from measurements import Row, commit, cpu_name, read, store

RESULTS = Path(__file__).parent / "results"
TURN = 5e-3  # seconds that a contender runs before the next one's
HOW = f"Best times, contenders interleaved in turns of {1e3 * TURN:g} ms."
# glibc hands big tensors back to the system at once, and faulting their pages in again would be timed with them.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def restart_with_malloc_settings() -> None:
    """Runs this process again with the allocator settings above; glibc reads them only at the start."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def without_grad(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """A contender: the function's answer to these arguments, no derivatives recorded."""
    import torch

    def call() -> object:
        with torch.no_grad():
            return function(*arguments)

    return call


def best_times(contenders: dict[str, Callable[[], object]], seconds: float, threads: int = 1) -> dict[str, float]:
    """Best time of each contender in milliseconds, about `seconds` shared out among them."""
    clock = time.process_time if threads == 1 else time.perf_counter
    best, repeats = {}, {}
    for name, function in contenders.items():
        function()
        start = clock()
        function()
        best[name] = clock() - start
        repeats[name] = max(1, int(TURN / max(best[name], 1e-7)))
    rounds, end = 0, clock() + seconds
    gc.disable()
    try:
        while rounds < 2 or clock() < end:
            rounds += 1
            for name, function in contenders.items():
                # A few calls are enough for a slow contender.
                if rounds > 1 and best[name] * repeats[name] > seconds / 4:
                    continue
                start = clock()
                for _ in range(repeats[name]):
                    function()
                best[name] = min(best[name], (clock() - start) / repeats[name])
    finally:
        gc.enable()
    return {name: 1e3 * t for name, t in best.items()}


def machine() -> Row:
    import torch

    from kruify.ops import backend_info

    info = Path("/proc/cpuinfo")
    return {
        "cpu": cpu_name(),
        "avx512": info.exists() and "avx512f" in info.read_text(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "backend": backend_info()["cpu"],
        "commit": commit(),
        "load_at_start": os.getloadavg()[0],
    }


class Results:
    """Rows of results/NAME.jsonl, written one by one, so that a broken run goes on where it stopped.

    The first line of the file says on what machine they were measured, and whatever else they have in common.
    """

    def __init__(self, name: str, fresh: bool = False) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        if fresh:
            self.path.unlink(missing_ok=True)
        self.about, *self.rows = read(self.path) or [{"machine": machine()}]

    def missing(self, keys: list[Row]) -> Iterator[Row]:
        done = [{k: row[k] for k in keys[0]} for row in self.rows] if keys else []
        yield from (key for key in keys if key not in done)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        store(self.path, self.about, "machine")
        store(self.path, row, *row)


def threads(count: int) -> AbstractContextManager[None]:
    """Inside, torch computes with so many; imported late, as this process may begin again."""
    from kruify.layers.timing import torch_threads

    return torch_threads(count)
