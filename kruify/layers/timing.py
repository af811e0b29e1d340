"""How long layers take, measured in turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

Run = Callable[[], None]
STEPS = 64
LEAST, MOST = 5, 200  # rounds that count


def layer_run(
    module: nn.Module, input_size: int, batch: int, steps: int = STEPS, *, batch_first: bool = False, cell: bool = False
) -> Run:
    """One run of a recurrent layer or cell over random sequences, as a function to be timed."""
    leading = (batch, steps) if batch_first and not cell else (steps, batch)
    dtype = next((p.dtype.to_real() for p in module.parameters()), torch.float32)  # torch's int8 layers have none
    x = torch.randn(*leading, input_size, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run() -> None:
        if not cell:
            module(x)
            return
        state = None
        for step in x:
            state = module(step, state)

    return run


def together(runs: Sequence[Run]) -> Run:
    """All of them, one after the other."""

    def run() -> None:
        for one in runs:
            one()

    return run


def interleaved(
    runs: Sequence[Run], seconds: float, tell: Callable[[float], None] = lambda share: None
) -> list[list[float]]:
    """Seconds of each run, over at least `LEAST` rounds; the first round, which warms up, is thrown away.

    Args:
        seconds: for all runs together.
        tell: called after each round with the share that is done.
    """
    samples: list[list[float]] = [[] for _ in runs]
    start, rounds = time.perf_counter(), 0
    while rounds <= LEAST or (time.perf_counter() - start < seconds and rounds < MOST):
        for run, sample in zip(runs, samples, strict=True):
            begin = time.perf_counter()
            run()
            sample.append(time.perf_counter() - begin)
        rounds += 1
        tell(min(1.0, max((time.perf_counter() - start) / max(seconds, 1e-9), rounds / MOST)))
    return [sample[1:] for sample in samples]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
