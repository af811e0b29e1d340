"""Tables and pictures from the ledger."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from grid import ABLATIONS, METHODS, TASKS

Entry = dict[str, Any]


def draw(entries: list[Entry], folder: Path) -> None:
    """Write results.md, and one picture a task and quantity, to `folder`."""
    if not entries:
        return
    (folder / "results.md").write_text("\n".join(table(entries)) + "\n")
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kruify"  # the same picture is the same file
    for task in sorted({e["task"] for e in entries}):
        mine = [e for e in entries if e["task"] == task and not e["options"].get("short")]
        picture(mine, "recurrent_parameters", "recurrent parameters", folder / f"{task}-parameters.svg")
        if any("latency_ms_per_step" in e for e in mine):
            picture(mine, "latency", "ms a step, B = 1", folder / f"{task}-latency.svg")


def grouped(entries: list[Entry]) -> dict[tuple[str, float, float, str], list[Entry]]:
    """(method, times smaller, epochs, further options) -> one entry a seed."""
    groups: dict[tuple[str, float, float, str], list[Entry]] = defaultdict(list)
    for e in entries:
        named = {"epochs", "seed"}
        setup, method = TASKS[e["task"]], METHODS[e["method"]]
        base = setup.teacher if method.start in ("scratch", "smaller") else setup.student
        usual = {**base, **method.options}
        further = ", ".join(f"{k} {shown(v)}" for k, v in e["options"].items() if k not in named and usual.get(k) != v)
        whole = "whole model" if e.get("whole") else ""
        notes = ", ".join(part for part in (whole, further) if part)
        groups[e["method"], e["times"], e["options"]["epochs"], notes].append(e)
    return groups


def table(entries: list[Entry]) -> list[str]:
    lines = ["# Accuracy back: results", "", "Made by `python benchmarks/recovery/run.py --draw` from `ledger/`.", ""]
    for task in sorted({e["task"] for e in entries}, key=list(TASKS).index):
        mine = [e for e in entries if e["task"] == task]
        metric = mine[0]["metric"]
        machines = ", ".join(sorted({f"{e['machine']}, {e['threads']} thread(s)" for e in mine}))
        lines += [f"## {task} ({TASKS[task].name}): {metric}", "", machines, ""]
        columns = [
            "method",
            "epochs",
            "recurrent parameters",
            "whole model",
            "multiply-adds a step",
            f"{metric}, valid",
        ]
        columns += [f"{metric}, test", "training loss", "seeds", "ms a step, B=1 / 32"]
        lines.append(row(columns))
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        sign = -1 if mine[0]["higher_is_better"] else 1
        rows = sorted(
            grouped(mine).items(),
            key=lambda item: (
                item[0][1],
                item[0][2],
                sign * center(item[1], "test", metric),
            ),
        )
        for (method, times, epochs, further), group in rows:
            first = group[0]
            title = (
                METHODS[method].title + (f", {times:g}x" if times != 1 else "") + (f" ({further})" if further else "")
            )
            loss = [h["loss"] for e in group for h in e.get("history", [])[-1:]]
            speed = first.get("latency_ms_per_step")
            cells = [title, f"{epochs:g}", f"{first['recurrent_parameters']:,}", f"{first['parameters']:,}"]
            cells += [f"{first['recurrent_multiply_adds']:,}", spread(group, "valid", metric)]
            cells += [spread(group, "test", metric), f"{statistics.mean(loss):.3f}" if loss else "", str(len(group))]
            cells.append(f"{speed['1']:.3f} / {speed['32']:.3f}" if speed else "")
            lines.append(row(cells))
        lines.append("")
    return lines + ablations({e["cell"]: e for e in entries})


def ablations(entries: dict[str, Entry]) -> list[str]:
    """The default recipe with one thing changed at a time."""
    task = next(iter(ABLATIONS.values())).task
    lines = [f"## What each ingredient of the default recipe is worth ({task}, 16x, one seed)", ""]
    lines += [row([task, "valid", "test"]), "|---|---|---|"]
    for title, cell in ABLATIONS.items():
        e = entries.get(cell.key)
        lines.append(row([title, *(f"{e[s][e['metric']]:.3f}" if e else "not run yet" for s in ("valid", "test"))]))
    return lines


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def center(group: list[Entry], split: str, metric: str) -> float:
    return statistics.mean(e[split][metric] for e in group)


def spread(group: list[Entry], split: str, metric: str) -> str:
    values = [e[split][metric] for e in group]
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def picture(entries: list[Entry], quantity: str, label: str, path: Path) -> None:
    """Metric against a cost, one curve a method."""
    from matplotlib import pyplot

    metric = entries[0]["metric"]
    curves: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for (method, _, epochs, further), group in grouped(entries).items():
        if further:
            continue
        first = group[0]
        cost = first[quantity] if quantity != "latency" else first.get("latency_ms_per_step", {}).get("1")
        if cost:
            curves[method, epochs].append((cost, center(group, "test", metric)))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    several = len({epochs for _, epochs in curves}) > 1
    for (method, epochs), points in sorted(curves.items()):
        xs, ys = zip(*sorted(points), strict=True)
        title = METHODS[method].title + (f" ({epochs:g} epochs)" if several else "")
        axes.plot(xs, ys, marker="o", markersize=4, label=title)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(f"{metric} on test")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
