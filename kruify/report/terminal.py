"""The report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kruify.report.report import Report


def tables(report: Report) -> list[Table]:
    """The recurrent matrices (a row a gate), then the comparison (a column a model), which is what stays in sight."""
    return [_matrices(report), _comparison(report)]


def _comparison(report: Report) -> Table:
    where = f"latency: recurrent layers, {report.latency['steps']} steps, {report.latency['threads']} thread(s), "
    table = Table(caption=where + str(report.latency["machine"]), caption_justify="left")
    table.add_column("")
    for model in report.models:
        table.add_column(model.name, justify="right", overflow="fold")
    models = report.models
    for label, values, better in (
        ("recurrent parameters", [m.parameters["recurrent"] for m in models], "smaller"),
        ("input parameters", [m.parameters["input"] for m in models], "smaller"),
        ("whole model parameters", [m.parameters["total"] for m in models], "smaller"),
        ("file, bytes", [m.bytes for m in models], "smaller"),
        ("multiply-adds per step", [m.multiply_adds_per_step for m in models], "fewer"),
    ):
        table.add_row(label, *_cells(values, "{:,}", better))
    for batch in models[0].latency_ms:
        cells = _cells([m.latency_ms[batch] for m in models], "{:.2f}", "faster")
        table.add_row(f"latency, batch {batch}, ms", *cells)
    for name in report.models[0].metrics:
        label = f"[bold]{name}[/bold] ({report.split})" if name == report.metric else f"{name} ({report.split})"
        table.add_row(label, *(f"{model.metrics[name]:.4f}" for model in report.models))
    return table


def _cells(values: Sequence[float], text: str, better: str) -> list[str]:
    """The first value, and the others with how many times less they are, where it is worth a word."""
    first = values[0]
    ratios = [first / value if value else 1.0 for value in values]
    return [
        text.format(value) + (f" ({ratio:.1f}x {better})" if ratio >= 1.05 else "")
        for value, ratio in zip(values, ratios, strict=True)
    ]


def _matrices(report: Report) -> Table:
    table = Table(title="recurrent matrices: condition number, spectral norm, unitarity defect", title_justify="left")
    table.add_column("matrix", overflow="fold")
    table.add_column("gate")
    for model in report.models:
        table.add_column(model.name, justify="right", overflow="fold")
    health = [{(m.name, m.gate): m for m in model.recurrent_matrices} for model in report.models]
    for key in dict.fromkeys(key for entries in health for key in entries):
        cells = []
        for entries in health:
            entry = entries.get(key)
            cells.append(
                f"{entry.condition_number:.3g}  {entry.spectral_norm:.2f}  {entry.unitarity_defect:.2f}"
                if entry
                else ""
            )
        table.add_row(*key, *cells)
    return table
