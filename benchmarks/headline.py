"""The README's picture and headline table, from committed results alone: nothing is measured here.

    python benchmarks/headline.py            draws headline.svg and writes the table into README.md
    python benchmarks/headline.py --check    says whether both are what the results say; exit code 1 if not

Speed: results/cpu_layers.jsonl (cpu_layers.py). Accuracy: recovery/g2p/runs.jsonl (recovery/run.py); of several runs
of one method at one size those with the best metric on the validation split count, and what is shown is the test split.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURE, README = HERE / "headline.svg", HERE.parent / "README.md"
MARKS = re.compile(r"(<!-- headline -->\n).*?(<!-- /headline -->)", re.DOTALL)

Row = dict[str, Any]
HIDDEN, BATCHES = (256, 512, 1024, 2048), (1, 8, 32)
TASK = "g2p"
DENSE = "dense"
SERIES = {  # name in the picture -> methods of recovery/grid.py, also with "recipe-" before them
    "kruify": ("recipe", "kron", "low-rank-"),
    "low rank": ("low-rank",),
    "magnitude pruning": ("pruned",),
    "smaller dense": ("smaller",),
}


def speeds(kind: str, what: str = "forward", spec: str = "auto") -> dict[tuple[int, int], Row]:
    """(hidden, batch) -> row of one layer on one thread with its dense input matrix."""
    wanted = {"kind": kind, "what": what, "spec": spec, "threads": 1, "inputs": 128}
    rows = _lines(HERE / "results" / "cpu_layers.jsonl")
    return {(r["hidden"], r["batch"]): r for r in rows if all(r.get(k) == v for k, v in wanted.items())}


def times(row: Row) -> float:
    return float(row["ms"]["dense"] / row["ms"]["kruify"])


def runs() -> list[Row]:
    """All full runs of the task whose recurrent matrices alone were made smaller."""
    return [run for run in _lines(HERE / "recovery" / TASK / "runs.jsonl") if not run["whole"]]


def _lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def series_of(method: str) -> str | None:
    method = method.removeprefix("recipe-")
    if method in ("dense", "dense-longer"):  # from scratch, and trained on as long as a converted one
        return DENSE
    exact = {names[0]: series for series, names in SERIES.items() if len(names) == 1}
    if method in exact:
        return exact[method]
    return next((s for s, names in SERIES.items() if method.startswith(names) and method != "low-rank"), None)


def chosen(found: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """Series -> recurrent parameters -> the runs (one per seed) of the method and options best on "valid"."""
    groups: dict[tuple[str, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in found:
        if series := series_of(run["method"]):
            groups[series, run["recurrent_parameters"]][run["run"].rpartition("-s")[0]].append(run)
    result: dict[str, dict[int, list[Row]]] = defaultdict(dict)
    for (series, size), candidates in sorted(groups.items()):
        result[series][size] = min(candidates.values(), key=lambda runs: _loss(runs, "valid"))
    return result


def _loss(runs: list[Row], split: str) -> float:
    """Mean over seeds of the metric, lower is better."""
    metric = runs[0]["metric"]
    return statistics.mean((-1 if e["higher_is_better"] else 1) * e[split][metric] for e in runs)


def draw() -> str:
    """Left: how many times faster than torch.nn's layer. Right: word error against recurrent parameters."""
    from kruify.reporting import pictures

    lstm, accuracy = speeds("lstm"), chosen(runs())

    def bars(axes: Any) -> None:
        for place, batch in enumerate(BATCHES):
            xs = [i + 0.27 * (place - 1) for i, hidden in enumerate(HIDDEN) if (hidden, batch) in lstm]
            ys = [times(lstm[hidden, batch]) for hidden in HIDDEN if (hidden, batch) in lstm]
            axes.bar(xs, ys, 0.25, color=pictures.SERIES[(1, 3, 2)[place]], label=f"batch {batch}")
            for x, y in zip(xs, ys, strict=True):
                text = f"{y:.0f}" if y >= 10 else f"{y:.1f}"
                axes.annotate(text, (x, y), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9)
        axes.axhline(1, color=pictures.FAINT, linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(0.8, 140)
        axes.set_yticks([1, 3, 10, 30, 100], ["1x", "3x", "10x", "30x", "100x"])
        axes.minorticks_off()
        axes.set_xticks(range(len(HIDDEN)), map(str, HIDDEN))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("hidden units")
        axes.set_title("KRU-LSTM: times faster than nn.LSTM")
        axes.legend(ncols=3, loc="upper left", handlelength=0.8, columnspacing=1.0, handletextpad=0.4)

    def points(axes: Any) -> None:
        metric, seen = runs()[0]["metric"], []
        for place, (series, sizes) in enumerate(accuracy.items()):
            ys = [abs(_loss(group, "test")) for group in sizes.values()]
            seen += ys
            color = pictures.SERIES[0] if series == DENSE else pictures.SERIES[1 + list(SERIES).index(series)]
            if series == DENSE:
                axes.axhline(ys[-1], color=color, linewidth=1, linestyle=":")
            axes.plot(list(sizes), ys, marker="o", markersize=6, color=color, label=series, zorder=3 + (place == 0))
            for x, y in zip(sizes, ys, strict=True):
                if series in (DENSE, "kruify"):
                    axes.annotate(
                        f"{y:.3f}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
                    )
        counts = sorted({size for sizes in accuracy.values() for size in sizes})
        axes.set_xscale("log")
        axes.set_xlim(counts[0] / 2.2, counts[-1] * 2.2)
        axes.set_xticks(counts, [pictures.compact(n) for n in counts])
        axes.minorticks_off()
        room = max(0.05, max(seen) - min(seen))
        axes.set_ylim(min(seen) - 0.25 * room, max(seen) + 0.6 * room)
        axes.set_xlabel("recurrent parameters")
        axes.set_title(f"Spelling to sound: word error ({metric}) on test")
        axes.legend(loc="upper right", handlelength=1.2)

    def paint(figure: Any) -> None:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04)
        left, right = figure.subplots(1, 2)
        bars(left)
        points(right)

    return pictures.standalone(paint, 3.6)


def table() -> str:
    """Speed and accuracy side by side with the dense original, in Markdown."""
    lines = ["| | dense | kruify | |", "| --- | ---: | ---: | ---: |"]
    results = chosen(runs())
    (dense,) = results[DENSE].values()
    for size, group in sorted(results["kruify"].items(), reverse=True):
        smaller = dense[0]["recurrent_parameters"] / size
        before, after = abs(_loss(dense, "test")), abs(_loss(group, "test"))
        passes = f"{group[0]['options']['epochs']:g} passes after conversion"
        label = f"word error, GRUs of 256 units, {passes}, {len(group)} seed{'s' * (len(group) > 1)}"
        lines.append(f"| {label} | {before:.3f} | {after:.3f} | recurrent matrices **{smaller:.0f}x smaller** |")
    for kind, what, hidden, batch in (
        ("lstm", "forward", 512, 1),
        ("lstm", "forward", 1024, 1),
        ("lstm", "forward", 1024, 32),
        ("gru", "forward", 1024, 8),
        ("lstm", "training", 1024, 8),
    ):
        row = speeds(kind, what).get((hidden, batch))
        if row:
            label = f"{kind.upper()} of {hidden} units, batch {batch}, {what}"
            before, after = (f"{number(row['ms'][name])} ms" for name in ("dense", "kruify"))
            lines.append(f"| {label} | {before} | {after} | **{number(times(row), 2)}x faster** |")
    return "\n".join(lines) + "\n"


def number(value: float, digits: int = 3) -> str:
    """Significant digits, never with an exponent."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def main(check: bool) -> None:
    readme = README.read_text(encoding="utf-8")
    wanted = MARKS.sub(lambda match: match[1] + table() + match[2], readme)
    if check:
        sys.exit(0 if wanted == readme and PICTURE.exists() and draw() == PICTURE.read_text() else 1)
    PICTURE.write_text(draw())
    README.write_text(wanted, encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main("--check" in sys.argv)
