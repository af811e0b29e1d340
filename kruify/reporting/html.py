"""The report as one HTML file: no network, no script; light, dark, printed, on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kruify.analysis.matrices import MatrixHealth
from kruify.reporting import pictures, training
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.rows import (
    GATE_COLUMNS,
    Row,
    comparison,
    gate_cells,
    latency_note,
    metric_note,
    provenance,
    summary,
    title,
)
from kruify.reporting.style import CSS

STRONG_ROW = ' class="strong"'
TEXT_CELL = ' class="text"'
SHORT = ' class="short"'


def to_html(report: Report, heading: str | None = None, knee: str | None = None) -> str:
    """The whole page.

    Args:
        heading: of the page; by default what the report is about.
        knee: name of the model at which a trade-off curve bends; it is marked.

    Raises:
        UnsupportedError: matplotlib, which draws the pictures, is not installed.
    """
    heading = heading or title(report)
    body = [
        f"<h1>{escape(heading)}</h1>",
        f'<p class="note">{escape(metric_note(report) or "No task was named: sizes and speed only.")}</p>',
        _summary(report, knee),
        "<h2>Comparison</h2>",
        f'<div class="card long">{_rows(report, report.models, comparison(report))}</div>',
        f'<p class="note">{escape(latency_note(report))}</p>',
        "<h2>Pictures</h2>",
        f'<div class="pictures">{_pictures(report, knee)}</div>',
        "<h2>Recurrent matrices</h2>",
        "<details><summary>Gate by gate: energy, condition number, spectral norm, singular values</summary>",
        "<p>Energy is what the factored matrix has in common with the dense one, "
        "1 &minus; ‖W&minus;K‖²/‖W‖²; beside it stands what the same structure keeps of a random matrix. "
        "After fine-tuning a low energy is no fault: the network has found another solution. "
        "Condition number, spectral norm and unitarity defect tell how the state is stretched at every step.</p>",
        *(_gates(report, index) for index in range(len(report.models))),
        f'<h3>Singular values</h3><div class="pictures">{_spectra(report)}{_conditioning(report)}</div></details>',
        "<h2>How it was made</h2>",
        *(_made(model, index) for index, model in enumerate(report.models)),
        "<footer>Written by kruify. This file holds everything it shows; it loads nothing.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _key(index: int) -> str:
    return f'<span class="key" style="background:var(--c{index % len(pictures.SERIES)})"></span>'


def _summary(report: Report, knee: str | None) -> str:
    found = summary(report, knee)
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return f'<section class="card">{_rows(report, found.models, found.rows, "compare short")}<ul>{notes}</ul></section>'


def _rows(report: Report, models: Sequence[ModelReport], rows: Sequence[Row], names: str = "compare") -> str:
    heads = "".join(f"<th>{_key(report.models.index(m))}{escape(m.name)}</th>" for m in models)
    lines = []
    for row in rows:
        cells = "".join(
            f"<td>{escape(value)}" + (f"<small>{escape(change)}</small>" if change else "") + "</td>"
            for value, change in zip(row.values, row.changes, strict=True)
        )
        lines.append(f"<tr{STRONG_ROW if row.main else ''}><th>{escape(row.label)}</th>{cells}</tr>")
    return _table(f"<th></th>{heads}", "".join(lines), names)


def _table(head: str, rows: str, names: str = "") -> str:
    opened = f'<table class="{names}">' if names else "<table>"
    return f'<div class="scroll">{opened}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _pictures(report: Report, knee: str | None) -> str:
    better = "higher" if report.higher_is_better else "lower"
    found = [
        (
            "Accuracy against size",
            pictures.tradeoff(report, knee),
            f"{report.metric} on the {report.split} split; {better} is better.",
        ),
        ("Latency", pictures.latency(report), "Bar and figure: median. Mark: 95th percentile. Shorter is faster."),
        ("Parameters", pictures.sizes(report), "Numbers in the file, by where they stand."),
        (
            f"Training: {report.metric}",
            training.over_epochs(report, lambda entry: entry["metrics"].get(report.metric)),
            "Validation split, after each epoch.",
        ),
        (
            "Training: loss on the train split",
            training.over_epochs(report, lambda entry: entry.get("loss")),
            "Mean over the train split in each epoch.",
        ),
    ]
    return "".join(_figure(name, svg, caption) for name, svg, caption in found if svg)


def _conditioning(report: Report) -> str:
    found = [
        (
            "Training: condition number",
            training.over_epochs(report, training.largest_condition_number),
            "The largest of all recurrent matrices.",
        ),
        (
            "Training: gradient through time",
            training.gradients(report),
            "Norm of the gradient that reaches the state at each step, at the end of the run.",
        ),
    ]
    return "".join(_figure(name, svg, caption) for name, svg, caption in found if svg)


def _figure(name: str, svg: str, caption: str) -> str:
    return f'<figure class="card"><h3>{escape(name)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _gates(report: Report, index: int) -> str:
    model = report.models[index]
    if all(entry.factors == "dense" for entry in model.recurrent_matrices) and index:
        return ""
    labels = ("gate", *GATE_COLUMNS)
    parts = []
    for name in dict.fromkeys(entry.name for entry in model.recurrent_matrices):
        rows = "".join(_gate_row(entry, labels) for entry in model.recurrent_matrices if entry.name == name)
        head = "".join(f"<th{TEXT_CELL if i == 1 else ''}>{label}</th>" for i, label in enumerate(labels))
        parts.append(f'<p class="note matrix"><code>{escape(name)}</code></p>{_table(head, rows, "gates")}')
    opened = " open" if 0 < index <= 2 and len(parts) <= 6 else ""
    return (
        f'<section class="card long"><h3>{_key(index)}{escape(model.name)}</h3>'
        f"<details{opened}><summary>{len(parts)} recurrent {'matrix' if len(parts) == 1 else 'matrices'}</summary>"
        f"{''.join(parts)}</details></section>"
    )


def _gate_row(entry: MatrixHealth, labels: Sequence[str]) -> str:
    factors, parameters, *others = map(escape, gate_cells(entry))
    if entry.parameters != entry.dense_parameters:
        parameters += f"<small>of {entry.dense_parameters:,}</small>"
    spec = f"<code{SHORT if len(factors) <= 40 else ''}>{factors}</code>"
    cells = (escape(entry.gate), spec, parameters, *others)
    return (
        "<tr>"
        + "".join(
            f'<td data-label="{escape(label)}"{TEXT_CELL if i == 1 else ""}><span>{cell}</span></td>'
            for i, (label, cell) in enumerate(zip(labels, cells, strict=True))
        )
        + "</tr>"
    )


def _spectra(report: Report) -> str:
    names = dict.fromkeys(entry.name for model in report.models for entry in model.recurrent_matrices)
    entries = (
        (_key(index), pictures.short(model.name, 40))
        for index, model in enumerate(report.models)
        if model.recurrent_matrices
    )
    keys = " ".join(f'<span class="entry">{key}{escape(name)}</span>' for key, name in entries)
    return "".join(
        f'<figure class="card"><h3><code>{escape(name)}</code></h3>{pictures.spectra(report, name)}'
        f"<figcaption>{keys}<br>From the largest to the smallest, on a logarithmic scale.</figcaption></figure>"
        for name in names
    )


def _made(model: ModelReport, index: int) -> str:
    folded = ("fine-tuning", "plan")
    entries = provenance(model)
    listed = "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(v)}</code></dd>" for k, v in entries if k not in folded)
    extra = "".join(
        f"<details><summary>{label}</summary><pre>{escape(text)}</pre></details>"
        for label, text in entries
        if label in folded
    )
    return f'<section class="card long"><h3>{_key(index)}{escape(model.name)}</h3><dl>{listed}</dl>{extra}</section>'
