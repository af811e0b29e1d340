"""How long the recurrent layers of several models take, measured against each other in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kruify.analysis.layers import Layers

BATCHES = (1, 32)
STEPS = 64
SECONDS = 2.0  # spent on each model and batch size


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of the recurrent layers over sequences of `steps`.

    Attributes:
        median: one entry per model: batch size -> milliseconds.
        p95: the same for the 95th percentile.
    """

    median: list[dict[int, float]]
    p95: list[dict[int, float]]
    steps: int
    threads: int


def measure_latency(
    models: Sequence[Layers],
    *,
    batches: Sequence[int] = BATCHES,
    steps: int = STEPS,
    threads: int = 1,
    seconds: float = SECONDS,
) -> Latency:
    """Times the recurrent layers of several models against each other, on the CPU, on random inputs.

    Models take turns, so that a busy moment of the machine falls on all of them.

    Args:
        seconds: spent on each batch size and model.
    """
    modules = [layers.modules() for layers in models]
    medians: list[dict[int, float]] = [{} for _ in models]
    p95s: list[dict[int, float]] = [{} for _ in models]
    with _threads(threads), torch.inference_mode():
        for batch in batches:
            runs = [runner(layers, module, batch, steps) for layers, module in zip(models, modules, strict=True)]
            samples = _interleaved(runs, seconds * len(runs))
            for median, p95, sample in zip(medians, p95s, samples, strict=True):
                median[batch] = 1e3 * statistics.median(sample)
                p95[batch] = 1e3 * sorted(sample)[int(0.95 * (len(sample) - 1) + 0.5)]
    return Latency(medians, p95s, steps, threads)


def runner(layers: Layers, modules: Sequence[nn.Module], batch: int, steps: int) -> Callable[[], None]:
    """One run of all layers over random sequences, as a function to be timed."""
    generator = torch.Generator().manual_seed(0)
    work: list[tuple[nn.Module, Tensor, bool]] = []
    for (layer, _), module in zip(layers.items, modules, strict=True):
        leading = (batch, steps) if layer.batch_first and not layer.cell else (steps, batch)
        x = torch.randn(*leading, layer.input_size, generator=generator)
        dtype = next((p.dtype.to_real() for p in module.parameters()), torch.float32)  # torch's int8 layers have none
        work.append((module, x.to(dtype), layer.cell))

    def run() -> None:
        for module, x, cell in work:
            if not cell:
                module(x)
                continue
            state = None
            for step in x:
                state = module(step, state)

    return run


def _interleaved(runs: Sequence[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds of each run, over at least 5 rounds; the first, which warms up, is thrown away."""
    samples: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    rounds = 0
    while rounds < 6 or (time.perf_counter() - start < seconds and rounds < 200):
        for run, sample in zip(runs, samples, strict=True):
            begin = time.perf_counter()
            run()
            sample.append(time.perf_counter() - begin)
        rounds += 1
    return [sample[1:] for sample in samples]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
