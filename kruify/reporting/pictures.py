"""The pictures of a report: matplotlib, as SVG that takes its colours from the page (light, dark, print).

Colours are drawn as placeholders and replaced by CSS variables: --ink, --faint, --grid, --soft, --c0 ... --c5. A
picture is 330 points wide: its text can be read on a phone without zooming, and two stand side by side on a desk.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kruify.errors import UnsupportedError
from kruify.reporting.report import Report
from kruify.reporting.style import CSS

INK, FAINT, GRID, SOFT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c0{i}" for i in range(6))
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", SOFT: "soft"} | {c: f"c{i}" for i, c in enumerate(SERIES)}
WIDTH = 330 / 72  # inches

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kruify",
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def color(index: int) -> str:
    return SERIES[index % len(SERIES)]


def draw(paint: Callable[[Any], None], height: float) -> str:
    """An inline SVG of what `paint` puts on a figure of WIDTH x `height` inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    return _inline(_render(paint, WIDTH, height))


def standalone(paint: Callable[[Any], None], height: float) -> str:
    """An SVG file, twice as wide, in the colours of the light page.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    svg = _render(paint, 2 * WIDTH, height)
    colors = dict(re.findall(r"--(\w+):(#[0-9a-f]{6});", CSS.partition("@media")[0]))
    for placeholder, name in VARIABLES.items():
        svg = svg.replace(placeholder, colors[name])
    page = f'<rect width="100%" height="100%" fill="{colors["card"]}"/>'
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + page, svg, count=1)


def _render(paint: Callable[[Any], None], width: float, height: float) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "the package matplotlib is not installed", "pictures", "Run: pip install 'kruify[report]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _inline(svg: str) -> str:
    """Without XML header, metadata and names that would repeat on the page; colours as variables of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(
        r"font: ([\d.]+px)[^\";]*|font-family: [^\";]*;? ?", lambda m: f"font-size: {m[1]}" if m[1] else "", svg
    )
    svg = svg.replace("xlink:href", "href")
    for placeholder, name in VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg.replace("<svg", '<svg role="img" aria-hidden="true"', 1)


def short(name: str, most: int = 22) -> str:
    """A name that fits beside a bar."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def sizes(report: Report) -> str:
    """Parameters of each model but the rivals, which have those of the first: recurrent, input, other."""
    parts = ("recurrent", "input", "other")
    models = [m for m in report.models if not m.is_rival]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        names = [short(m.name) for m in models]
        left = [0.0] * len(names)
        for index, part in enumerate(parts):
            values = [getattr(m.parameters, part) for m in models]
            shade = (SERIES[1], SERIES[0], SOFT)[index]
            axes.barh(range(len(names)), values, left=left, color=shade, height=0.62, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for row, total in enumerate(left):
            _label(axes, total, row, compact(total))
        _bars(axes, names, max(left))
        axes.xaxis.set_major_formatter(lambda x, _: compact(x))
        axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, handlelength=1.0)

    return draw(paint, 0.8 + 0.33 * len(models))


def latency(report: Report) -> str:
    """Median latency of each model by batch size, with a mark at the 95th percentile."""
    batches = list(report.models[0].latency_ms)

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
        names = [short(m.name) for m in report.models]
        for axes, batch in zip(panels, batches, strict=True):
            medians = [m.latency_ms[batch] for m in report.models]
            p95 = [m.latency_p95_ms.get(batch, m.latency_ms[batch]) for m in report.models]
            axes.barh(range(len(names)), medians, color=[color(i) for i in range(len(names))], height=0.62)
            for row, (median, worst) in enumerate(zip(medians, p95, strict=True)):
                axes.plot([worst, worst], [row - 0.31, row + 0.31], color=INK, linewidth=1.2)
                _label(axes, max(median, worst), row, f"{number(median)} ms, p95 {number(worst)}")
            _bars(axes, names, max(*medians, *p95), room=1.75)
            axes.set_title(f"batch {batch}")

    return draw(paint, (0.6 + 0.33 * len(report.models)) * len(batches))


class Curve(NamedTuple):
    """One line of a picture.

    Attributes:
        place: of its colour in `SERIES`.
    """

    place: int
    label: str
    x: list[float]
    y: list[float]
    dashed: bool = False


def plot(axes: Any, curves: Sequence[Curve], label: str, markersize: float = 0) -> None:
    """Curves over integers; on a logarithmic scale where the values span more than a factor of 30 and allow it."""
    for curve in curves:
        line = "--" if curve.dashed else "-"
        marks = {"marker": "o", "markersize": markersize} if markersize else {}
        axes.plot(curve.x, curve.y, color=color(curve.place), linestyle=line, label=curve.label, **marks)
    finite = [value for curve in curves for value in curve.y if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 30:
        axes.set_yscale("log")
    else:
        from_zero(axes, finite)
    axes.set_xlabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)


def from_zero(axes: Any, values: Sequence[float]) -> None:
    """Nothing on the axis looks larger than it is: it begins at 0 where no value is below."""
    if min(values, default=-1.0) >= 0:
        axes.set_ylim(bottom=0)


def curves_svg(curves: Sequence[Curve], label: str, markersize: float = 0) -> str | None:
    """A picture of its own; None without curves."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        plot(axes, curves, label, markersize)
        legend_above(axes)

    return draw(paint, 2.2 + 0.18 * len(curves)) if curves else None


def spectra(report: Report, matrix: str) -> str:
    """Singular values of one recurrent matrix, one panel per gate, dense against converted."""
    found = [(i, e) for i, m in enumerate(report.models) for e in m.recurrent_matrices if e.name == matrix]
    gates = list(dict.fromkeys(entry.gate for _, entry in found))
    columns = 2 if len(gates) > 1 else 1
    rows = -(-len(gates) // columns)

    def paint(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (axes, gate) in enumerate(zip(panels, gates, strict=False)):
            largest = 0.0
            for index, values in ((i, entry.singular_values) for i, entry in found if entry.gate == gate):
                share = [i / max(1, len(values) - 1) for i in range(len(values))]
                axes.plot(share, values, color=color(index), linewidth=1.5)
                largest = max(largest, *values)
            axes.set_title(f"gate {gate}")
            axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
            axes.tick_params(axis="x", labelbottom=place + columns >= len(gates))
            if largest > 0:
                axes.set_yscale("log")
                axes.set_ylim(largest / 2000, largest * 2)
                axes.minorticks_off()
                axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        for axes in panels[len(gates) :]:
            axes.set_visible(False)

    return draw(paint, 1.45 * rows + 0.2)


def tradeoff(report: Report, knee: str | None = None) -> str | None:
    """The task's metric against bytes of weights, as a curve where a knee is to be marked; None without a task."""
    if report.metric is None:
        return None
    key = report.metric

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        if knee is not None:
            curve = sorted((m.weight_bytes, m.metrics[key]) for m in report.models if not m.is_rival)
            axes.plot(*zip(*curve, strict=True), color=GRID, linewidth=1.5, zorder=1)
        for index, model in enumerate(report.models):
            if key not in model.metrics:
                continue
            x, y = model.weight_bytes, model.metrics[key]
            if model.name == knee:
                axes.plot([x], [y], "o", color=INK, markersize=14, fillstyle="none", markeredgewidth=1.2, clip_on=False)
                # Inside the bend, where no other point can be.
                place = {"xytext": (-8, 8 if report.higher_is_better else -14), "textcoords": "offset points"}
                axes.annotate("knee", (x, y), ha="right", fontsize=10, **place)
            axes.plot([x], [y], "o", color=color(index), markersize=8, clip_on=False, label=short(model.name, 30))
        axes.set_xscale("log")
        axes.set_xlabel("weights in the file")
        _few_log_ticks(axes, [m.weight_bytes for m in report.models], "B")
        axes.margins(y=0.25)
        from_zero(axes, [m.metrics[key] for m in report.models if key in m.metrics])
        legend_above(axes)

    return draw(paint, 2.2 + 0.18 * len(report.models))


def _few_log_ticks(axes: Any, values: Sequence[float], unit: str) -> None:
    """Ticks at round numbers (1, 2, 5 times a power of ten) around the values, and no others."""
    low, high = min(values) / 1.5, max(values) * 1.5
    ticks = [m * 10**e for e in range(0, 13) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{compact(t)}{unit}" for t in ticks])
    axes.minorticks_off()


def _label(axes: Any, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)


def _bars(axes: Any, names: Sequence[str], most: float, room: float = 1.28) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, most * room)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.get_major_locator().set_params(nbins=4)


def legend_above(axes: Any) -> None:
    """Names over the axes, side by side where they are short."""
    longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
    columns = 3 if longest <= 9 else 2 if longest <= 16 else 1
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(**place, ncols=columns, handlelength=1.2, labelspacing=0.2, columnspacing=1.2)


def compact(value: float) -> str:
    """12,345,678 -> 12.3 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.1f}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.2g}"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
