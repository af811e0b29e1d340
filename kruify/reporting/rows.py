"""What every written form of a report has in common, as words: headline, comparison, gates, training, making."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kruify.analysis.matrices import MatrixHealth
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.training import largest_condition_number

GATE_COLUMNS = ("factors", "parameters", "energy (null)", "condition", "spectral norm", "unitarity defect")
WORSE = {"smaller": "larger", "fewer": "more", "faster": "slower"}
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Row:
    """One quantity: one value per model, and how each compares with the first model ("" where it does not).

    Attributes:
        main: whether it is one of those that matter most.
    """

    label: str
    values: list[str]
    changes: list[str]
    main: bool

    @property
    def cells(self) -> list[str]:
        """Each value with its change in brackets."""
        return [f"{v} ({c})" if c else v for v, c in zip(self.values, self.changes, strict=True)]


@dataclass(frozen=True)
class Summary:
    """What matters most, of the models that matter: the dense one, what was made of it in the end, it in eight bits.

    Attributes:
        rows: whole file, latency, accuracy, as far as they are known.
        notes: sentences below: latency that is not to be relied on, steps on the way, the knee, recurrent matrices.
    """

    models: list[ModelReport]
    rows: list[Row]
    notes: list[str]


def title(report: Report) -> str:
    first, *others = report.models
    if any(model.sources for model in others):
        return f"{first.name}: before and after conversion"
    return f"{first.name}, compared with {', '.join(model.name for model in others if not model.is_rival)}"


def summary(report: Report, knee: str | None = None) -> Summary:
    """The headline of every written form."""
    first = report.models[0]
    used = {source for model in report.models for source in model.sources}
    on_the_way = [m for m in report.models[1:] if m.sha256 in used and not m.is_rival]
    models = [m for m in report.models if m not in on_the_way]
    rows, notes = [_file_row(models)], []
    batch = min(first.latency_ms, default=None)
    if batch is not None and report.latency.busy:
        notes.append("Latency is in the comparison alone: other programs were running while it was measured.")
    elif batch is not None:
        values: list[float | None] = [m.latency_ms[batch] for m in models]
        rows.append(_row(f"Latency, batch {batch}", values, milliseconds, "faster"))
    if report.metric is not None:
        rows.append(_metric_row(report.metric, models, report.split))
        for model in on_the_way:
            notes.append(f"{model.name}, before fine-tuning: {report.metric} {metric(model.metrics[report.metric])}.")
    if knee is not None:
        notes.append(f"The knee is at {knee}: from there on compression costs more than it saves.")
    for model in models[1:]:
        if not model.is_rival:
            change = _change(first.parameters.recurrent, model.parameters.recurrent, "smaller") or "as large"
            notes.append(f"Recurrent matrices alone, {model.name}: {change}.")
    return Summary(models, rows, notes)


def _file_row(models: Sequence[ModelReport]) -> Row:
    """Of the files, or of the weights in them where the first file holds much else (optimizer state, code)."""
    first = models[0]
    if first.bytes > 1.1 * first.weight_bytes:
        return _row("Weights in the file", [m.weight_bytes for m in models], size, "smaller")
    return _row("Whole file", [m.bytes for m in models], size, "smaller")


def _metric_row(name: str, models: Sequence[ModelReport], split: str | None, main: bool = True) -> Row:
    known = [model.metrics.get(name) for model in models]  # None of what cannot run the task
    first = models[0].metrics[name]
    changes = [""] + ["" if value is None else f"{value - first:+.3f}" for value in known[1:]]
    return Row(f"{name}, {split} split", ["" if v is None else f"{v:.4f}" for v in known], changes, main)


def _row(
    label: str, values: Sequence[float | None], text: Callable[[float], str], better: str, main: bool = True
) -> Row:
    changes = [""] + [_change(values[0] or 0, other or 0, better) for other in values[1:]]
    return Row(label, ["" if v is None else text(v) for v in values], changes, main)


def times(before: float, after: float, better: str, what: str) -> tuple[str, str]:
    """("8.1x", "smaller: whole model")."""
    if not before or not after:
        return "-", what
    ratio, word = (after / before, WORSE[better]) if after > before * 1.005 else (before / after, better)
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x", f"{word}: {what}"


def metric(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def comparison(report: Report) -> list[Row]:
    """Bytes, latency, memory, metrics, parameters, multiply-adds."""
    models, rows = report.models, list[Row]()

    def add(label: str, values: Sequence[float | None], text: Callable[[float], str], better: str) -> None:
        rows.append(_row(label, values, text, better, label == "Weights in the file"))

    add("Weights in the file", [m.weight_bytes for m in models], size, "smaller")
    rows.append(Row("File, with all else in it", [size(m.bytes) for m in models], [""] * len(models), False))
    add("Tensors in memory", [m.memory_bytes for m in models], size, "smaller")
    for batch in models[0].latency_ms:
        add(f"Latency, batch {batch}: median", [m.latency_ms[batch] for m in models], milliseconds, "faster")
        if all(batch in m.latency_p95_ms for m in models):
            add(f"Latency, batch {batch}: p95", [m.latency_p95_ms[batch] for m in models], milliseconds, "faster")
    for batch in models[0].peak_memory_bytes:
        add(f"Peak memory, batch {batch}", [m.peak_memory_bytes.get(batch) for m in models], size, "smaller")
    rows += [_metric_row(name, models, report.split, name == report.metric) for name in models[0].metrics]
    for part, label in (
        ("total", "All parameters"),
        ("recurrent", "Recurrent parameters"),
        ("input", "Input parameters"),
        ("other", "Other parameters"),
    ):
        add(label, [getattr(m.parameters, part) for m in models], integer, "smaller")
    add("Multiply-adds per step", [m.multiply_adds_per_step for m in models], integer, "fewer")
    return rows


def _change(before: float, after: float, better: str) -> str:
    figure, word = times(before, after, better, "")
    return "" if figure in ("-", "1.0x") else f"{figure} {word.removesuffix(': ')}"


def integer(value: float) -> str:
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


def gate_cells(entry: MatrixHealth) -> tuple[str, ...]:
    """One gate of a recurrent matrix under `GATE_COLUMNS`."""
    energy = "-" if entry.energy is None else f"{entry.energy:.3f}"
    if entry.energy_null is not None:
        energy += f" ({entry.energy_null:.3f})"
    condition = "∞" if math.isinf(entry.condition_number) else f"{entry.condition_number:.3g}"
    norm, defect = f"{entry.spectral_norm:.3g}", f"{entry.unitarity_defect:.3g}"
    return entry.factors, f"{entry.parameters:,}", energy, condition, norm, defect


def quarters(values: Sequence[float]) -> list[float]:
    """The largest singular value, those a quarter, half and three quarters of the way down, the smallest.

    What is nothing but rounding is 0.
    """
    chosen = [values[round(i * (len(values) - 1) / 4)] for i in range(5)]
    return [value if value > 1e-12 * values[0] else 0.0 for value in chosen]


def validations(model: ModelReport) -> list[tuple[str, list[float]]]:
    """Name of each quantity of the training -> one value per validation, NaN where unknown.

    The training loss, the metrics on the validation split, and the largest condition number of all recurrent matrices.
    """
    names = dict.fromkeys(name for entry in model.history for name in entry["metrics"])
    columns = [("training loss", [entry.get("loss") for entry in model.history])]
    columns += [(f"{name}, valid", [entry["metrics"].get(name) for entry in model.history]) for name in names]
    conditions = [largest_condition_number(entry) for entry in model.history]
    if any(value is not None for value in conditions):
        columns.append(("largest condition number", conditions))
    return [(name, [float(v) if isinstance(v, int | float) else math.nan for v in values]) for name, values in columns]


def plan(model: ModelReport) -> list[str]:
    """The factors of every converted matrix; matrices and gates with the same factors share a line."""
    gates: dict[tuple[str, str], list[str]] = {}
    for entry in model.recurrent_matrices:
        if entry.factors != "dense":
            gates.setdefault((entry.name, entry.factors), []).append(entry.gate)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, factors), of in gates.items():
        names.setdefault((", ".join(of), factors), []).append(name)
    return [f"{', '.join(alike)} ({of}): {factors}" for (of, factors), alike in names.items()]


def provenance(model: ModelReport) -> list[tuple[str, str]]:
    """How a file was made: (label, text)."""
    entries = [("file", model.file), ("sha256", model.sha256)]
    if model.sources:
        entries.append(("made from", " → ".join(source[:16] for source in model.sources)))
    entries += [(label, recipe(text) if label == "fine-tuning" else text) for label, text in model.made.items()]
    return entries + ([("plan", "\n".join(lines))] if (lines := plan(model)) else [])


def recipe(text: str) -> str:
    """The options of a fine-tuning run as the file records them, JSON or not, in one line."""
    try:
        values = json.loads(text)
    except ValueError:
        return text
    if not isinstance(values, dict):
        return text
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None, most: int = 12) -> str:
    """Values as a row of at most `most` blocks, from `low` to `high`, by default the least and the largest of them."""
    if len(values) > most:
        values = [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
    low = min(values, default=0.0) if low is None else low
    span = ((max(values, default=0.0) if high is None else high) - low) or 1.0
    return "".join(BLOCKS[round(min(1.0, max(0.0, (v - low) / span)) * (len(BLOCKS) - 1))] for v in values)


def sparkline_of_spectrum(values: Sequence[float]) -> str:
    """Singular values as blocks, on a logarithmic scale from a thousandth of the largest up to the largest."""
    top = values[0] if values else 0.0
    return sparkline([math.log10(v / top) if v > 0 else -math.inf for v in values], -3.0, 0.0) if top > 0 else ""


def latency_note(report: Report) -> str:
    """How latency and memory were measured, and of what they were not."""
    info = report.latency
    threads = "one thread" if info.threads == 1 else f"{info.threads} threads"
    said = (
        f"Latency and peak memory: the recurrent layers alone, {info.steps} steps, {threads}, models taking turns, "
        f"on {info.machine}; peak memory is what torch allocates beside the weights."
    )
    if info.busy:
        load = f"load {info.load:.1f} on {info.cores} cores"
        said += f" Other programs were running ({load}): the latency is not to be relied on."
    if report.without_int8:
        said += f" {report.models[0].name} (int8) by torch's dynamic quantisation is missing: {report.without_int8}."
    return said


def metric_note(report: Report) -> str:
    """What the metrics were measured on, one sentence; empty without a task."""
    if report.task is None:
        return ""
    count = "" if report.examples is None else f", {report.examples:,} examples"
    better = "higher" if report.higher_is_better else "lower"
    return f"Metrics: task {report.task}, {report.split} split{count}; {report.metric}: {better} is better."
