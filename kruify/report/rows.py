"""What every written form of a report has in common: the headline and the rows of the comparison, as words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kruify.report.report import Report


@dataclass(frozen=True)
class Row:
    """One quantity: a value a model, and how each compares with the first model ("" where it does not)."""

    label: str
    values: list[str]
    changes: list[str]


@dataclass(frozen=True)
class Headline:
    """What a converted model is against the first one, in figures for the eye: (figure, what it means)."""

    model: str
    figures: list[tuple[str, str]]


def headlines(report: Report) -> list[Headline]:
    """One for every model after the first."""
    first = report.models[0]
    batch = min(first.latency_ms, default=None)
    results = []
    for model in report.models[1:]:
        parts = model.parameters
        figures = [
            times(first.parameters["recurrent"], parts["recurrent"], "smaller", "larger", "recurrent matrices"),
            times(first.parameters["total"], parts["total"], "smaller", "larger", "whole model"),
        ]
        if batch is not None:
            what = f"recurrent layers, batch {batch}"
            figures.append(times(first.latency_ms[batch], model.latency_ms[batch], "faster", "slower", what))
        if report.metric is not None:
            before, after = first.metrics[report.metric], model.metrics[report.metric]
            figures.append((f"{metric(before)} → {metric(after)}", f"{report.metric}, {report.split} split"))
        results.append(Headline(model.name, figures))
    return results


def times(before: float, after: float, better: str, worse: str, what: str) -> tuple[str, str]:
    """("8.1x", "smaller: whole model")."""
    if not before or not after:
        return "-", what
    if after > before * 1.005:
        return f"{factor(after / before)}x", f"{worse}: {what}"
    return f"{factor(before / after)}x", f"{better}: {what}"


def factor(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def metric(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def comparison(report: Report) -> list[Row]:
    """Parameters, bytes, multiply-adds, latency, memory, metrics."""
    rows = []
    models = report.models

    def add(label: str, values: Sequence[float], text: Callable[[float], str], better: str) -> None:
        changes = [""] + [_change(values[0], other, better) for other in values[1:]]
        rows.append(Row(label, [text(v) for v in values], changes))

    for part, label in (
        ("recurrent", "Recurrent parameters"),
        ("input", "Input parameters"),
        ("other", "Other parameters"),
        ("total", "All parameters"),
    ):
        add(label, [m.parameters[part] for m in models], whole, "smaller")
    add("File", [m.bytes for m in models], size, "smaller")
    add("Tensors in memory", [m.memory_bytes for m in models], size, "smaller")
    add("Multiply-adds a step", [m.multiply_adds_per_step for m in models], whole, "fewer")
    for batch in models[0].latency_ms:
        add(f"Latency, batch {batch}: median", [m.latency_ms[batch] for m in models], milliseconds, "faster")
        if all(batch in m.latency_p95_ms for m in models):
            add(f"Latency, batch {batch}: p95", [m.latency_p95_ms[batch] for m in models], milliseconds, "faster")
    for batch in models[0].peak_memory_bytes:
        add(f"Peak memory, batch {batch}", [m.peak_memory_bytes[batch] for m in models], size, "smaller")
    for name in report.models[0].metrics:
        values = [model.metrics[name] for model in report.models]
        changes = [""] + [f"{value - values[0]:+.3f}" for value in values[1:]]
        rows.append(Row(f"{name}, {report.split} split", [f"{value:.4f}" for value in values], changes))
    return rows


def _change(before: float, after: float, better: str) -> str:
    if not before or not after or abs(after / before - 1) < 0.005:
        return ""
    worse = {"smaller": "larger", "fewer": "more", "faster": "slower"}[better]
    return f"{factor(before / after)}x {better}" if after < before else f"{factor(after / before)}x {worse}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def size(value: float) -> str:
    """Bytes with a unit, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the loop ends with GB")


def measured(report: Report) -> str:
    """How latency and memory were measured, one sentence."""
    info = report.latency
    threads = "one thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return (
        f"Latency and peak memory: the recurrent layers alone, {info['steps']} steps, {threads}, models taking turns, "
        f"on {info['machine']}; peak memory is what torch allocates beside the weights."
    )


def judged(report: Report) -> str:
    """What the metrics were measured on, one sentence; empty without a task."""
    if report.task is None:
        return ""
    count = "" if report.examples is None else f", {report.examples:,} examples"
    better = "higher" if report.higher_is_better else "lower"
    return f"Metrics: task {report.task}, {report.split} split{count}; {report.metric}: {better} is better."
