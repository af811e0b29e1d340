"""How long the recurrent layers of several models take, measured against each other in one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kruify.analysis.layers import Layers
from kruify.layers.timing import STEPS, Run, interleaved, layer_run, together, torch_threads
from kruify.progress import Progress

BATCHES = (1, 32)
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
    progress: Progress | None = None,
) -> Latency:
    """Times the recurrent layers of several models against each other, on the CPU, on random inputs.

    Models take turns, so that a busy moment of the machine falls on all of them.

    Args:
        seconds: spent on each batch size and model.
    """
    modules = [layers.modules() for layers in models]
    medians: list[dict[int, float]] = [{} for _ in models]
    p95s: list[dict[int, float]] = [{} for _ in models]
    with torch_threads(threads), torch.inference_mode():
        for place, batch in enumerate(batches):

            def tell(share: float, place: int = place) -> None:
                if progress is not None:
                    progress(place + share, len(batches), "measuring latency")

            runs = [runner(layers, module, batch, steps) for layers, module in zip(models, modules, strict=True)]
            samples = interleaved(runs, seconds * len(runs), tell)
            for median, p95, sample in zip(medians, p95s, samples, strict=True):
                median[batch] = 1e3 * statistics.median(sample)
                p95[batch] = 1e3 * sorted(sample)[int(0.95 * (len(sample) - 1) + 0.5)]
    return Latency(medians, p95s, steps, threads)


def runner(layers: Layers, modules: Sequence[nn.Module], batch: int, steps: int) -> Run:
    """One run of all layers over random sequences, as a function to be timed."""
    return together(
        [
            layer_run(module, layer.input_size, batch, steps, batch_first=bool(layer.batch_first), cell=layer.cell)
            for (layer, _), module in zip(layers.items, modules, strict=True)
        ]
    )
