"""Measures the models and puts the report together."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path

from kruify.analysis.contender import Contender, OnnxLayers, onnxruntime_int8, torch_int8
from kruify.analysis.counts import count_parameters, multiply_adds
from kruify.analysis.latency import measure_latency
from kruify.analysis.layers import layers_of
from kruify.analysis.matrices import matrix_health
from kruify.checkpoint import read
from kruify.conversion.network import load_network
from kruify.errors import UnsupportedError
from kruify.progress import Progress
from kruify.reporting.details import agreeing, history, peak_memory, provenance, sources, with_energies
from kruify.reporting.report import LatencySetup, ModelReport, Report
from kruify.tasks.base import Task
from kruify.tasks.evaluation import Evaluations
from kruify.tasks.loader import load_task


def report(
    dense: str | PathLike[str],
    *others: str | PathLike[str],
    task: Task | str | None = None,
    split: str = "test",
    key: str | None = None,
    threads: int = 1,
    latency_seconds: float = 2.0,
    progress: Progress | None = None,
) -> Report:
    """Compares files with the first one: parameters, bytes, multiply-adds, latency, and with a task its metrics.

    Where the first one is dense, the last models are that one in eight bits: by torch's dynamic quantisation, and where
    all its recurrent layers are LSTMs and onnxruntime is installed by that one's, without metrics.

    Args:
        key: the entry of a file that holds the state dict, where it has several.
        latency_seconds: spent on each model and batch size.

    Raises:
        UsageError: a file has no recurrent layer.
        KruifyError: a file cannot be read, or does not fit the task.
    """
    files, task_name = (dense, *others), task if isinstance(task, str) else type(task).__name__
    task = None if task is None else load_task(task)
    tell = progress or (lambda done, total, text: None)
    names = _names(files)
    checkpoints = [read(file, key=key) for file in files]
    layers = agreeing([layers_of(checkpoint) for checkpoint in checkpoints])
    metrics: list[dict[str, float]] = [{} for _ in files]
    if task is not None:
        evaluations = Evaluations(task, progress)
        for index, checkpoint in enumerate(checkpoints):
            metrics[index] = evaluations.measure(load_network(checkpoint, task), split, name=names[index])
    contenders: list[Contender] = []
    without_int8 = ""
    if not layers[0].planned:
        tell(0, 0, f"{names[0]} in eight bits")
        try:
            contenders.append(torch_int8(layers[0], task, split))
        except UnsupportedError as error:
            without_int8 = error.what
        with suppress(UnsupportedError):
            contenders.append(onnxruntime_int8(layers[0]))
    load = os.getloadavg()[0]
    measured = [*layers, *(int8.layers for int8 in contenders)]
    latency = measure_latency(measured, threads=threads, seconds=latency_seconds, progress=progress)
    models = []
    for index, (checkpoint, name) in enumerate(zip(checkpoints, names, strict=True)):
        tell(index, len(files), f"singular values: {name}")
        models.append(
            ModelReport(
                name=name,
                file=str(checkpoint.path),
                parameters=count_parameters(layers[index]),
                bytes=checkpoint.size,
                weight_bytes=checkpoint.weight_bytes,
                multiply_adds_per_step=multiply_adds(layers[index]),
                latency_ms=latency.median[index],
                metrics=metrics[index],
                recurrent_matrices=with_energies(matrix_health(layers[index]), layers[index], layers[0]),
                sha256=checkpoint.sha256,
                sources=sources(checkpoint),
                latency_p95_ms=latency.p95[index],
                memory_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.lazy.values()),
                peak_memory_bytes=peak_memory(layers[index], latency.steps),
                history=history(checkpoint),
                made=provenance(checkpoint),
            )
        )
    for place, int8 in enumerate(contenders, len(models)):
        outside = isinstance(int8.layers, OnnxLayers)  # torch does not see what that allocates
        models.append(
            replace(
                models[0],
                name=f"{models[0].name} ({int8.name})",
                bytes=int8.bytes,
                weight_bytes=int8.weight_bytes,
                memory_bytes=int8.weight_bytes,
                latency_ms=latency.median[place],
                latency_p95_ms=latency.p95[place],
                peak_memory_bytes={} if outside else peak_memory(int8.layers, latency.steps),
                metrics=int8.metrics,
                recurrent_matrices=[],
                history=[],
                made={"int8": int8.made},
            )
        )
    return Report(
        models=models,
        latency=LatencySetup(latency.steps, latency.threads, machine(), os.cpu_count(), load),
        task=None if task is None else task_name,
        split=None if task is None else split,
        examples=None if task is None else task.examples(split),
        metric=None if task is None else task.metric,
        higher_is_better=task is not None and task.higher_is_better,
        without_int8=without_int8,
    )


def _names(files: Sequence[str | PathLike[str]]) -> list[str]:
    """Unique names: of the files without their endings, with them, with as many folders before as tell them apart; a
    file that is named again has a number."""
    paths = [Path(file) for file in files]
    different = list(dict.fromkeys(paths))
    stems = []
    for path in different:
        stem = path.name
        for ending in (".safetensors", ".pth", ".pt", ".kru"):
            stem = stem.removesuffix(ending)
        stems.append(stem)
    deepest = max(len(path.parts) for path in paths)
    tails = [[str(Path(*path.parts[-n:])) for path in different] for n in range(1, deepest + 1)]
    names = dict(zip(different, next(n for n in (stems, *tails) if len(set(n)) == len(n)), strict=True))
    seen = [names[path] for path in paths]
    return [f"{name} ({place + 1})" if name in seen[:place] else name for place, name in enumerate(seen)]


def machine() -> str:
    """The processor's name, as far as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
