"""The README's picture and tables, from committed results alone: nothing is measured here.

    python benchmarks/headline.py            draws headline.svg and writes the tables into README.md
    python benchmarks/headline.py --check    says whether all are what the results say; exit code 1 if not

The headline is of one network per task: recovery/<task>/runs.jsonl (recovery/run.py), the grid by bytes of the whole
file. Of several ways to train the dense network or one of low rank, or to prune it, the one that is best on the
validation split counts; what is shown is the test split, the mean over seeds. The table of one Kronecker product is of
layers alone: results/cpu_layers.jsonl (cpu_layers.py).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PICTURE, README = HERE / "headline.svg", HERE.parent / "README.md"

Row = dict[str, Any]
TASKS = {  # in recovery/: what is done by what, its metric
    "g2p": "spelling to sound, GRUs of 256: word error",
    "kjv": "King James, LSTM of 512: bits per character",
    "fashion": "Fashion-MNIST by rows, LSTM of 128: accuracy",
    "jsb": "Bach chorales, GRU of 256: nats per frame",
}
DENSE, INT8, OWN_INT8, KRUIFY = "dense, float32", "dense, int8", "dense, kruify's int8", "kruify"
OWN_INT4 = "dense, kruify's int4"
PRUNED, SMALLER = "pruned, int8", "smaller dense, int8"
METHODS = {  # of recovery/grid.py, and what their runs have otherwise
    DENSE: ("converged", "converged-longer"),
    PRUNED: ("bytes-pruned", "bytes-pruned-gradual"),
    "low rank, int8": ("bytes-low-rank", "bytes-low-rank-slow"),
    SMALLER: ("bytes-smaller",),
    OWN_INT4: ("bytes-int4",),
    KRUIFY: ("bytes", "bytes-12ep-share0.0277778"),  # the latter on King James, whose dense network has 12 passes, too
}
DRAWN = ((DENSE,), (INT8, OWN_INT4), *((name,) for name in METHODS if name not in (DENSE, OWN_INT4)))
TIMES = 16  # how many times smaller the file in the table is
MISSING = "not run yet"


class Point(NamedTuple):
    """A network of one task: bytes of its file, metrics by split, milliseconds per step by batch size, seeds."""

    bytes: float
    valid: float
    test: float
    latency: dict[str, float]
    seeds: int


def runs(task: str) -> list[Row]:
    file = HERE / "recovery" / task / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def points(found: list[Row]) -> dict[str, dict[float, Point]]:
    """Series -> times smaller -> the network of the method that is best on "valid"."""
    groups: dict[tuple[str, float], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        way = row["run"].rpartition("/")[2].removesuffix(f"-s{row['seed']}")
        for series, methods in METHODS.items():
            if way in methods:
                groups[series, row["times"]][way].append(row)
    result: dict[str, dict[float, Point]] = defaultdict(dict)
    for (series, times), methods in groups.items():
        sign = -1 if found[0]["higher_is_better"] else 1
        common = set.intersection(*({row["seed"] for row in rows} for rows in methods.values()))  # seeds differ, too
        alike = {way: [r for r in rows if r["seed"] in common] or rows for way, rows in methods.items()}
        best = methods[min(alike, key=lambda way: sign * _mean(alike[way], "valid"))]
        latency = best[0].get("latency_ms_per_step", {})
        result[series][times] = Point(_bytes(best), _mean(best, "valid"), _mean(best, "test"), latency, len(best))
        if series == DENSE:
            for name, key in ((INT8, "int8"), (OWN_INT8, "rounded")):
                own = [{**row, **row[key]} for row in best]
                result[name][times] = Point(_bytes(own), 0.0, _mean(own, "test"), _fastest(best[0][key]), len(own))
    return result


def _mean(rows: list[Row], split: str) -> float:
    return statistics.mean(row[split][row["metric"]] for row in rows)


def _bytes(rows: list[Row]) -> float:
    return statistics.mean(row["bytes"] for row in rows)


def _fastest(int8: Row) -> dict[str, float]:
    """Of a network in int8, by each of the libraries that ran it: whichever is faster at a batch size."""
    forms = [int8.get(key, {}) for key in ("latency_ms_per_step", "onnxruntime_ms_per_step")]
    return {batch: min(form[batch] for form in forms if batch in form) for batch in forms[0]}


def measured() -> dict[str, dict[str, dict[float, Point]]]:
    """The tasks in which kruify's file of the table has been trained."""
    found = {task: points(runs(task)) for task in TASKS}
    return {task: series for task, series in found.items() if TIMES in series.get(KRUIFY, {})}


def table() -> str:
    """One file per task beside its rivals, in Markdown."""
    lines = ["| task | network | file | ms per step, B=1 | B=32 | on test |", "| --- | --- " + "| ---: " * 4 + "|"]
    found = measured()
    for task, series in found.items():
        dense = series[DENSE][1]
        dense_forms = [(name, 1) for name in (DENSE, INT8, OWN_INT8, OWN_INT4)]
        for name, times in (*dense_forms, (SMALLER, TIMES), (PRUNED, TIMES), (KRUIFY, TIMES)):
            point = series.get(name, {}).get(times)
            cells = [MISSING, "", "", ""] if point is None else _cells(point, dense)
            if name == KRUIFY:
                name, cells = f"**{name}**", [f"**{cell}**" if cell else "" for cell in cells]
            lines.append(f"| {' | '.join([TASKS[task] if point is dense else '', name, *cells])} |")
    if left := [what.partition(":")[0] for task, what in TASKS.items() if task not in found]:
        lines += ["", f"Not measured yet in this way: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


def _cells(point: Point, dense: Point) -> list[str]:
    smaller = "" if point is dense else f" ({number(dense.bytes / point.bytes)}x smaller)"
    latency = [number(point.latency[batch], 2) if batch in point.latency else "" for batch in ("1", "32")]
    seeds = f" ({point.seeds} seeds)" if point.seeds > 1 else ""
    return [f"{number(point.bytes / 1000)} kB{smaller}", *latency, f"{point.test:#.4g}{seeds}"]


def one_product() -> str:
    """How much less time a layer takes with one Kronecker product per gate, in Markdown."""
    lines = ["| one layer, 128 steps, float32 | dense | one product | |", "| --- | ---: | ---: | ---: |"]
    for kind, what, hidden, batch in (
        ("lstm", "forward", 512, 1),
        ("lstm", "forward", 1024, 1),
        ("lstm", "forward", 1024, 32),
        ("gru", "forward", 1024, 8),
        ("lstm", "training", 1024, 8),
    ):
        ms = speeds(kind, what)[hidden, batch]["ms"]
        label = f"{kind.upper()} of {hidden} units, batch {batch}, {what}"
        faster = number(ms["dense"] / ms["kruify"], 2)
        lines.append(f"| {label} | {number(ms['dense'])} ms | {number(ms['kruify'])} ms | {faster}x faster |")
    return "\n".join(lines) + "\n"


def speeds(kind: str, what: str) -> dict[tuple[int, int], Row]:
    """(hidden, batch) -> row of one layer on one thread with its dense input matrix."""
    wanted = {"kind": kind, "what": what, "spec": "auto", "threads": 1, "inputs": 128}
    lines = (HERE / "results" / "cpu_layers.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if all(row.get(k) == v for k, v in wanted.items())]
    return {(row["hidden"], row["batch"]): row for row in rows}


def draw() -> str:
    """Per task the metric on test against the bytes of the file."""
    from kruify.reporting import pictures

    def panel(axes: Any, task: str, series: dict[str, dict[float, Point]]) -> None:
        for place, (name, *more) in enumerate(DRAWN):
            known = sorted(point for one in (name, *more) for point in series.get(one, {}).values())
            if known:
                axes.plot(
                    [p.bytes / 1000 for p in known], [p.test for p in known], marker="o", markersize=6,
                    color=pictures.SERIES[place], label=" and ".join([name, *more]), zorder=3 + (name == KRUIFY),
                )  # fmt: skip
        axes.axhline(series[DENSE][1].test, color=pictures.SERIES[0], linewidth=1, linestyle=":")
        sizes = sorted({round(p.bytes / 1000) for name in (DENSE, INT8, KRUIFY) for p in series.get(name, {}).values()})
        axes.set_xscale("log")
        axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.margins(y=0.2)
        axes.set_xlabel("kB of the whole file")
        axes.set_title(TASKS[task])

    def paint(figure: Any) -> None:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04)
        found = measured()
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (task, series) in zip(panels, found.items(), strict=True):
            panel(axes, task, series)
        panels[0].legend(loc="best", handlelength=1.2)

    return pictures.standalone(paint, 3.6)


def number(value: float, digits: int = 3) -> str:
    """Significant digits, never with an exponent."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


BLOCKS = {"headline": table, "one product": one_product}


def filled(readme: str) -> str:
    """The page with its tables between their marks."""
    for name, make in BLOCKS.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = marks.sub(rf"\g<1>{make()}\g<2>", readme)
    return readme


def main(check: bool) -> None:
    readme = README.read_text(encoding="utf-8")
    wanted = filled(readme)
    if check:
        sys.exit(0 if wanted == readme and PICTURE.exists() and draw() == PICTURE.read_text() else 1)
    PICTURE.write_text(draw())
    README.write_text(wanted, encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main("--check" in sys.argv)
