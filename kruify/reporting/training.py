"""Pictures of how well a network carried state and gradient while it was trained, from the history of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kruify.errors import UsageError
from kruify.reporting.pictures import color, draw, legend_above, short, standalone
from kruify.reporting.report import Report

History = Sequence[Mapping[str, Any]]
Curve = tuple[list[float], list[float]]  # x, y
MEASURES = {
    "condition_number": "condition number",
    "spectral_norm": "spectral norm",
    "unitarity_defect": "unitarity defect",
}


def conditioning_svg(history: History) -> str:
    """A picture to be opened by itself: each measure over epochs, one curve per gate, and the gradient through time at
    the first and the last validation.

    Raises:
        UsageError: the history holds no conditioning.
        UnsupportedError: matplotlib is not installed.
    """
    if not any(_matrices(entry) for entry in history):
        raise UsageError(
            "there is nothing to draw: the network has no recurrent layer that kruify knows", "conditioning"
        )

    def paint(figure: Any) -> None:
        panels = figure.subplots(2, 2).ravel()
        for axes, (measure, title) in zip(panels, MEASURES.items(), strict=False):
            _curves(axes, gates(history, measure), title)
        _through_time(panels[3], {"start": history[0], "end": history[-1]})

    return standalone(paint, 4.6)


def condition_numbers(report: Report) -> str | None:
    """The largest condition number of each model's recurrent matrices over epochs; None if no file has them."""
    curves = {}
    for index, model in enumerate(report.models):
        found = [(float(entry["epoch"]), largest_condition_number(entry)) for entry in model.history]
        known = [(x, y) for x, y in found if y is not None]
        if known:
            x, y = zip(*known, strict=True)
            curves[index] = (short(model.name, 30), (list(x), list(y)))
    if not curves:
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, (name, (x, y)) in curves.items():
            axes.plot(x, y, color=color(index), marker="o", markersize=3, label=name)
        _axes(axes, "epoch", [value for _, (_, y) in curves.values() for value in y])
        legend_above(axes)

    return draw(paint, 2.2 + 0.16 * len(curves))


def gradients(report: Report) -> str | None:
    """The gradient through time of each model at its last validation; None if no file has them."""
    entries = {i: m.history[-1] for i, m in enumerate(report.models) if m.history and _gradients(m.history[-1])}
    if not entries:
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        seen = []
        for index, entry in entries.items():
            for place, (layer, (x, y)) in enumerate(_gradients(entry).items()):
                name = short(report.models[index].name, 30) + (f" {layer}" if place else "")
                axes.plot(x, y, color=color(index), linestyle="-" if not place else "--", label=name)
                seen += y
        _axes(axes, "step", seen)
        legend_above(axes)

    return draw(paint, 2.2 + 0.16 * len(entries))


def gates(history: History, measure: str) -> dict[str, Curve]:
    """Gate -> epochs and values of one measure; the gate alone is the name where there is one matrix."""
    found: dict[tuple[str, str], Curve] = {}
    for entry in history:
        for matrix in _matrices(entry):
            x, y = found.setdefault((matrix["name"], matrix["gate"]), ([], []))
            x.append(float(entry["epoch"]))
            y.append(float(matrix[measure]))
    several = len({name for name, _ in found}) > 1
    return {f"{name} {gate}" if several else gate: curve for (name, gate), curve in found.items()}


def _curves(axes: Any, curves: Mapping[str, Curve], title: str) -> None:
    for index, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, color=color(index + 1), marker="o", markersize=2.5, label=short(name))
    axes.set_title(title)
    _axes(axes, "epoch", [value for _, y in curves.values() for value in y])
    if len(curves) > 1:
        axes.legend(ncols=2, handlelength=1.2, labelspacing=0.2)


def _through_time(axes: Any, entries: Mapping[str, Mapping[str, Any]]) -> None:
    seen: list[float] = []
    for index, (when, entry) in enumerate(entries.items()):
        for place, (layer, (x, y)) in enumerate(_gradients(entry).items()):
            label = f"{when} of the run" + (f", {layer}" if place else "")
            axes.plot(x, y, color=color(index), linestyle="-" if not place else "--", label=label)
            seen += y
    axes.set_title("gradient through time, |dL/dh_t|")
    _axes(axes, "step t", seen)
    if seen:
        axes.legend(handlelength=1.2, labelspacing=0.2)


def largest_condition_number(entry: Mapping[str, Any]) -> float | None:
    """Of all recurrent matrices at one validation; None where the file does not tell."""
    return max((float(m["condition_number"]) for m in _matrices(entry)), default=None)


def _axes(axes: Any, label: str, values: Sequence[float]) -> None:
    """A logarithmic scale where the values span more than a factor of 30 and allow it."""
    axes.set_xlabel(label)
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 30:
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _matrices(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates of an entry as a file records them; malformed entries are left out."""
    found = entry.get("conditioning")
    matrices = found.get("matrices") if isinstance(found, dict) else None
    wanted = {"name": str, "gate": str, **dict.fromkeys(MEASURES, float | int)}
    return [
        m
        for m in (matrices if isinstance(matrices, list) else [])
        if isinstance(m, dict) and all(isinstance(m.get(key), kind) for key, kind in wanted.items())
    ]


def _gradients(entry: Mapping[str, Any]) -> dict[str, Curve]:
    found = entry.get("conditioning")
    layers = found.get("gradient") if isinstance(found, dict) else None
    curves = {}
    for name, curve in layers.items() if isinstance(layers, dict) else ():
        steps, norms = (curve.get(key) for key in ("steps", "norms")) if isinstance(curve, dict) else (None, None)
        if isinstance(steps, list) and isinstance(norms, list) and len(steps) == len(norms):
            curves[str(name)] = ([float(s) for s in steps], [float(n) for n in norms])
    return curves
