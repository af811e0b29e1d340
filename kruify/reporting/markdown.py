"""The report as Markdown, for a model card."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    quarters,
    summary,
    title,
    validations,
)


def to_markdown(report: Report) -> str:
    """All that the HTML page says, in tables that every Markdown reader knows; curves as numbers."""
    return f"# {_text(title(report))}\n\n{body(report)}"


def body(report: Report) -> str:
    """The Markdown below its title."""
    found = summary(report)
    lines = [*_rows(found.models, found.rows), "", *(f"- {_text(note)}" for note in found.notes)]
    lines += ["", "## Comparison", "", *_rows(report.models, comparison(report))]
    lines += ["", *(sentence for sentence in (metric_note(report), latency_note(report)) if sentence)]
    for model in report.models:
        lines += _training(model)
    lines += [
        "",
        "<details><summary>Recurrent matrices, gate by gate</summary>",
        "",
        "Energy against the dense matrix; in brackets that of a random matrix. Singular values: the largest, those a "
        "quarter, half and three quarters of the way down, the smallest.",
        "",
    ]
    rows = []
    for model in report.models:
        for entry in model.recurrent_matrices:
            factors, *cells = gate_cells(entry)
            values = ", ".join(f"{value:.2g}" for value in quarters(entry.singular_values))
            rows.append([model.name, f"`{entry.name}`", entry.gate, f"`{factors}`", *cells, values])
    lines += table(["model", "matrix", "gate", *GATE_COLUMNS, "singular values"], rows)
    lines += ["", "</details>", "", "## How it was made", ""]
    for model in report.models:
        made = (f"{label} `{_text(text)}`" for label, text in provenance(model))
        lines.append(f"- {_text(model.name)}: {', '.join(made)}")
    return "\n".join(lines) + "\n"


def _training(model: ModelReport) -> list[str]:
    """One row per validation; nothing where the file does not tell."""
    if not model.history:
        return []
    columns = validations(model)
    rows = [
        [f"{entry.get('epoch', '')}", *("" if math.isnan(values[i]) else metric(values[i]) for _, values in columns)]
        for i, entry in enumerate(model.history)
    ]
    heads = ["epoch", *(name for name, _ in columns)]
    return ["", f"## Training of {_text(model.name)}", "", *table(heads, rows)]


def _rows(models: Sequence[ModelReport], rows: Sequence[Row]) -> list[str]:
    return table(["", *(model.name for model in models)], [[row.label, *row.cells] for row in rows])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first column holds words, the others figures."""
    marks = ["---"] + ["---:"] * (len(heads) - 1)
    return ["| " + " | ".join(map(_text, line)) + " |" for line in (heads, marks, *rows)]


def _text(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", "; ")
