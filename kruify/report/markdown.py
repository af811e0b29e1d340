"""The report as Markdown, for a model card."""

from __future__ import annotations

from collections.abc import Sequence

from kruify.report.report import Report
from kruify.report.rows import comparison, headlines, judged, measured


def to_markdown(report: Report) -> str:
    """Headline, comparison, gates and how each file was made, in tables that every Markdown reader knows."""
    lines = [f"# {_text(report.models[0].name)}, converted", ""]
    for headline in headlines(report):
        figures = ", ".join(f"**{figure}** {meaning}" for figure, meaning in headline.figures)
        lines.append(f"- {_text(headline.model)}: {figures}")
    lines += ["", "## Comparison", ""]
    lines += _table(
        ["", *(m.name for m in report.models)],
        [
            [row.label, *(f"{v} ({c})" if c else v for v, c in zip(row.values, row.changes, strict=True))]
            for row in comparison(report)
        ],
    )
    lines += ["", *(sentence for sentence in (judged(report), measured(report)) if sentence)]
    lines += [
        "",
        "## Recurrent matrices",
        "",
        "Energy against the dense matrix; in brackets that of a random matrix.",
        "",
    ]
    heads = [
        "model",
        "matrix",
        "gate",
        "factors",
        "parameters",
        "energy",
        "condition",
        "spectral norm",
        "unitarity defect",
    ]
    rows = [
        [
            model.name,
            f"`{entry.name}`",
            entry.gate,
            f"`{entry.factors}`",
            f"{entry.parameters:,}",
            "" if entry.energy is None else f"{entry.energy:.3f} ({entry.energy_null or 0:.3f})",
            f"{entry.condition_number:.3g}",
            f"{entry.spectral_norm:.3g}",
            f"{entry.unitarity_defect:.3g}",
        ]
        for model in report.models
        for entry in model.recurrent_matrices
    ]
    lines += _table(heads, rows)
    lines += ["", "## Files", ""]
    for model in report.models:
        made = "".join(f", {label} {text}" for label, text in model.made.items() if label != "fine-tuning")
        sources = f", made from {' → '.join(s[:16] for s in model.sources)}" if model.sources else ""
        lines.append(f"- {_text(model.name)}: `{model.file}`, sha256 `{model.sha256}`{sources}{_text(made)}")
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---"] + ["---:"] * (len(heads) - 1)
    return ["| " + " | ".join(map(_text, line)) + " |" for line in (heads, marks, *rows)]


def _text(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
