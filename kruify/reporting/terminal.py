"""The report for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from kruify.analysis.matrices import MatrixHealth
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.rows import (
    GATE_COLUMNS,
    Row,
    comparison,
    gate_cells,
    latency_note,
    metric,
    metric_note,
    provenance,
    sparkline,
    sparkline_of_spectrum,
    summary,
    validations,
)

WIDEST = 10_000  # columns, of a table that nothing bounds
IN_PLAN = "factors"  # of GATE_COLUMNS: too wide for a terminal, and the plan has them


def tables(report: Report, details: bool = False) -> list[RenderableType]:
    """How the files were trained; then the comparison and the summary, which stay in sight.

    Their strings are plain text: print them on a console without markup.

    Args:
        details: whether how the files were made, and every gate of every recurrent matrix, are shown first.
    """
    parts: list[RenderableType] = []
    if details:
        parts += [_made(report), *(_gates(m) for m in report.models if m.recurrent_matrices)]
    if any(model.history for model in report.models):
        parts.append(_training(report))
    said = " ".join(sentence for sentence in (metric_note(report), latency_note(report)) if sentence)
    parts.append(_models("comparison", report.models, comparison(report), said))
    found = summary(report)
    return [*parts, _models("in short", found.models, found.rows), *found.notes]


class Fitting:
    """A table, or what stands for it where it is wider than the terminal."""

    def __init__(self, whole: Table, parts: Sequence[RenderableType]) -> None:
        self.whole, self.parts = whole, parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = console.measure(self.whole, options=options.update(width=WIDEST)).maximum <= options.max_width
        yield from [self.whole] if fits else self.parts


def table(title: str, *columns: str, words: int = 1, caption: str | None = None) -> Table:
    """A table whose first `words` columns hold words, the others figures."""
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < words else "right", overflow="fold")
    return made


def _made(report: Report) -> Table:
    table = Table(title="how it was made", title_justify="left", show_header=False)
    for widest in (22, None, None):
        table.add_column(overflow="fold", max_width=widest)
    for model in report.models:
        entries = provenance(model)
        for place, (label, text) in enumerate(entries):
            table.add_row("" if place else model.name, label, text, end_section=place == len(entries) - 1)
    return table


def _gates(model: ModelReport) -> Fitting:
    names = dict.fromkeys(entry.name for entry in model.recurrent_matrices)
    parts = [(name, [e for e in model.recurrent_matrices if e.name == name]) for name in names]
    return Fitting(_matrices(model, model.recurrent_matrices), [_matrices(model, found, name) for name, found in parts])


def _matrices(model: ModelReport, entries: Sequence[MatrixHealth], name: str = "") -> Table:
    """Gates; `name` is that of the one matrix that they belong to."""
    kept = [place for place, column in enumerate(GATE_COLUMNS) if column != IN_PLAN]
    heads = [GATE_COLUMNS[place].replace(" ", "\n") for place in kept]  # leaves more room for names
    made = table(f"{model.name}: {name or 'recurrent matrices'}", "gate", *heads, "singular\nvalues")
    for entry in entries:
        cells = gate_cells(entry)
        curve = sparkline_of_spectrum(entry.singular_values)
        made.add_row(entry.gate if name else f"{entry.name} {entry.gate}", *(cells[place] for place in kept), curve)
    return made


def _training(report: Report) -> Table:
    made = table("training", "model", "quantity", "first", "last", "curve")
    for model in report.models:
        for name, values in validations(model):
            known = [v for v in values if math.isfinite(v)]
            if not known:
                continue
            made.add_row(model.name, name, metric(known[0]), metric(known[-1]), sparkline(known, min(0.0, *known)))
    return made


def _models(title: str, models: Sequence[ModelReport], rows: Sequence[Row], caption: str | None = None) -> Fitting:
    """All models side by side, or each beside the first."""
    whole = _beside(title, models, rows, range(len(models)))
    pairs = [_beside(title, models, rows, [0, other]) for other in range(1, len(models))] or [whole]
    whole.caption = pairs[-1].caption = caption
    return Fitting(whole, pairs)


def _beside(title: str, models: Sequence[ModelReport], rows: Sequence[Row], places: Sequence[int]) -> Table:
    made = table(title, "", *(models[place].name for place in places))
    for row in rows:
        label = Text(row.label, "bold") if row.main else row.label
        made.add_row(label, *(row.cells[place] for place in places))
    return made
