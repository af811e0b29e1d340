"""Pictures of how well a network carried state and gradient while it was trained, from the history of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kruify.errors import UsageError
from kruify.reporting.pictures import Curve, curves_svg, plot, short, standalone
from kruify.reporting.report import Report

History = Sequence[Mapping[str, Any]]
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
            _panel(axes, title, _gates(history, measure), "epoch", 2.5)
        ends = [*_gradients(history[0], 0, "start of the run"), *_gradients(history[-1], 1, "end of the run")]
        _panel(panels[3], "gradient through time, |dL/dh_t|", ends, "step t")

    return standalone(paint, 4.6)


def _panel(axes: Any, title: str, curves: Sequence[Curve], label: str, markersize: float = 0) -> None:
    axes.set_title(title)
    plot(axes, curves, label, markersize)
    if len(curves) > 1:
        axes.legend(ncols=2 if len(curves) > 3 else 1, handlelength=1.2, labelspacing=0.2)


def over_epochs(report: Report, value: Callable[[Mapping[str, Any]], Any]) -> str | None:
    """One quantity of each validation, a curve per model; None where no file has it at two validations."""
    curves = []
    for index, model in enumerate(report.models):
        points = [(entry.get("epoch"), value(entry)) for entry in model.history]
        known = [p for p in points if all(isinstance(n, int | float) and math.isfinite(n) for n in p)]
        if len(known) > 1:
            x, y = (list(map(float, numbers)) for numbers in zip(*known, strict=True))
            curves.append(Curve(index, short(model.name, 30), x, y))
    return curves_svg(curves, "epoch", 3)


def gradients(report: Report) -> str | None:
    """The gradient through time of each model at its last validation; None if no file has them."""
    trained = [(index, model) for index, model in enumerate(report.models) if model.history]
    return curves_svg([c for i, m in trained for c in _gradients(m.history[-1], i, short(m.name, 30))], "step")


def _gates(history: History, measure: str) -> list[Curve]:
    """One measure over epochs, per gate; the gate alone is the name where there is one matrix."""
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for entry in history:
        for matrix in _matrices(entry):
            x, y = found.setdefault((matrix["name"], matrix["gate"]), ([], []))
            x.append(float(entry["epoch"]))
            y.append(float(matrix[measure]))
    several = len({name for name, _ in found}) > 1
    labels = [short(f"{name} {gate}" if several else gate) for name, gate in found]
    return [Curve(i, label, *curve) for i, (label, curve) in enumerate(zip(labels, found.values(), strict=True), 1)]


def largest_condition_number(entry: Mapping[str, Any]) -> float | None:
    """Of all recurrent matrices at one validation; None where the file does not tell."""
    return max((float(m["condition_number"]) for m in _matrices(entry)), default=None)


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


def _gradients(entry: Mapping[str, Any], index: int, name: str) -> list[Curve]:
    """The norm of the gradient at each step, per layer; malformed entries are left out."""
    found = entry.get("conditioning")
    layers = found.get("gradient") if isinstance(found, dict) else None
    curves: list[Curve] = []
    for layer, curve in layers.items() if isinstance(layers, dict) else ():
        steps, norms = (curve.get(key) for key in ("steps", "norms")) if isinstance(curve, dict) else (None, None)
        if isinstance(steps, list) and isinstance(norms, list) and len(steps) == len(norms):
            label = f"{name}, {layer}" if curves else name
            curves.append(Curve(index, label, [float(s) for s in steps], [float(n) for n in norms], bool(curves)))
    return curves
