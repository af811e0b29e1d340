"""What a report says, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from kruify.analysis.counts import ParameterCounts
from kruify.analysis.matrices import MatrixHealth
from kruify.errors import UnsupportedError


@dataclass(frozen=True)
class ModelReport:
    """One file, or the dense network in eight bits: it has file, parameters and multiply-adds of the dense one, no
    recurrent matrices to show, and by ONNX Runtime no metrics and no peak memory.

    Attributes:
        name: short name, unique within the report.
        file: path as it was named.
        parameters: trainable numbers.
        bytes: size of the file.
        weight_bytes: of its tensors, with indices and scales; the rest is optimizer state, code, a header.
        multiply_adds_per_step: of one step in time of all recurrent layers, one sequence.
        latency_ms: batch size -> median milliseconds of the recurrent layers.
        metrics: of the task; empty without one.
        recurrent_matrices: one entry per gate.
        sha256: of the file.
        sources: sha256 of the files that it was made from, the first one first.
        latency_p95_ms: batch size -> 95th percentile of the same measurement.
        memory_bytes: of all tensors of the file, loaded.
        peak_memory_bytes: batch size -> the most that one run of the recurrent layers allocates beside them.
        history: one entry per validation of the fine-tuning that made it (epoch, step, loss, metrics), if known.
        made: how it was made: versions, seed and recipe that the file records.
    """

    name: str
    file: str
    parameters: ParameterCounts
    bytes: int
    multiply_adds_per_step: int
    latency_ms: dict[int, float]
    metrics: dict[str, float]
    recurrent_matrices: list[MatrixHealth]
    sha256: str
    sources: list[str] = field(default_factory=list)
    latency_p95_ms: dict[int, float] = field(default_factory=dict)
    memory_bytes: int = 0
    weight_bytes: int = 0
    peak_memory_bytes: dict[int, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)

    @property
    def is_rival(self) -> bool:
        """Whether it is the dense network in eight bits."""
        return not self.recurrent_matrices


@dataclass(frozen=True)
class LatencySetup:
    """How latency was measured: time steps per sequence, threads, the processor, its cores, the load average before."""

    steps: int
    threads: int
    machine: str
    cores: int | None = None
    load: float | None = None

    @property
    def busy(self) -> bool:
        """Whether more programs were running than the processor has cores."""
        return bool(self.load and self.cores and self.load > self.cores)


@dataclass(frozen=True)
class Report:
    """Several models, the first of which the others are compared with, bytes of weights with bytes of weights.

    Attributes:
        latency: how it was measured.
        task, split, examples: what the metrics were measured on; None without a task.
        metric: key of the metric that decides; None without a task.
        higher_is_better: of that metric.
        without_int8: why the dense network in eight bits by torch is not among the models; empty where it is, or where
            the first model is not dense.
    """

    models: list[ModelReport]
    latency: LatencySetup
    task: str | None = None
    split: str | None = None
    examples: int | None = None
    metric: str | None = None
    higher_is_better: bool = False
    without_int8: str = ""

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """For every model after the first: how many times smaller and faster it is, and how its metrics differ."""
        first = self.models[0]
        return [
            {
                "name": model.name,
                **{
                    f"{part}_parameters": _ratio(getattr(first.parameters, part), n)
                    for part, n in vars(model.parameters).items()
                },
                "bytes": _ratio(first.weight_bytes, model.weight_bytes),
                "multiply_adds_per_step": _ratio(first.multiply_adds_per_step, model.multiply_adds_per_step),
                "latency": {batch: _ratio(first.latency_ms[batch], ms) for batch, ms in model.latency_ms.items()},
                "metrics_change": {name: value - first.metrics[name] for name, value in model.metrics.items()},
            }
            for model in self.models[1:]
        ]

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify report --json` prints."""
        return {**asdict(self), "ratios": self.ratios}

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the page, in a frame that keeps its styles to itself; nothing without matplotlib."""
        from kruify.reporting.html import to_html

        try:
            page = escape(to_html(self))
        except UnsupportedError:
            return None
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40rem; border: 0"></iframe>'


def _ratio(first: float, other: float) -> float | None:
    return first / other if other else None
