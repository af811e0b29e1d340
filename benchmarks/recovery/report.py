"""results.md from the recorded runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from grid import ABLATIONS, CONVERGED, METHODS, TASKS
from measurements import Row

MS = "ms per step, B=1 / 32"
COLUMNS = ("method", "epochs", "recurrent parameters", "whole model", "multiply-adds per step")


def write(runs: list[Row], page: Path) -> None:
    lines = ["# Accuracy back: results", ""]
    lines += ["Made by `python benchmarks/recovery/run.py --report` from the `runs.jsonl` of each task.", ""]
    for task in TASKS:
        if mine := [r for r in runs if r["task"] == task and METHODS[r["method"]].dense != CONVERGED]:
            lines += table(task, mine)
    lines += by_bytes(runs)
    lines += ablations({r["run"]: r for r in runs})
    lines += ["", *eight_bits(runs)]
    page.write_text("\n".join(lines) + "\n")


def table(task: str, runs: list[Row]) -> list[str]:
    metric = runs[0]["metric"]
    machines = ", ".join(sorted({f"{r['machine']}, {r['threads']} thread(s)" for r in runs}))
    columns = [*COLUMNS, f"{metric}, valid", f"{metric}, test", "training loss", "seeds", MS]
    lines = [f"## {task} ({TASKS[task].name}): {metric}", "", machines, "", row(columns), "|---" * len(columns) + "|"]
    sign = -1 if runs[0]["higher_is_better"] else 1
    rows = grouped(runs).items()
    for (method, times, epochs, notes), group in sorted(rows, key=lambda r: (*r[0][1:3], sign * mean(r[1], "test"))):
        first = group[0]
        title = METHODS[method].title + (f", {times:g}x" if times != 1 else "") + (f" ({notes})" if notes else "")
        cells = [title, f"{epochs:g}", f"{first['recurrent_parameters']:,}", f"{first['parameters']:,}"]
        cells += [f"{first['recurrent_multiply_adds']:,}", spread(group, "valid"), spread(group, "test")]
        lines.append(row([*cells, *loss_seeds_latency(group)]))
    return [*lines, ""]


def grouped(runs: list[Row]) -> dict[tuple[str, float, float, str], list[Row]]:
    """(method, times smaller, epochs, further options) -> one run per seed."""
    groups: dict[tuple[str, float, float, str], list[Row]] = defaultdict(list)
    for r in runs:
        usual = {**METHODS[r["method"]].options_on(TASKS[r["task"]]), "epochs": ..., "seed": ...}
        changed = {k: v for k, v in r["options"].items() if usual.get(k) not in (v, ...)}
        notes = ["whole model"] * r["whole"] + [
            f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in changed.items()
        ]
        groups[r["method"], r["times"], r["options"]["epochs"], ", ".join(notes)].append(r)
    return groups


def by_bytes(runs: list[Row]) -> list[str]:
    """Every network that was made from a converged dense one, and that one, with the bytes of its file."""
    lines = ["## Bytes of the whole file", ""]
    for task in TASKS:
        mine = [r for r in runs if r["task"] == task and METHODS[r["method"]].dense == CONVERGED]
        if not mine:
            continue
        metric = mine[0]["metric"]
        columns = ["file", "method", "epochs", "bytes", f"{metric}, test", "training loss", "seeds", MS]
        lines += [f"### {task} ({TASKS[task].name})", "", row(columns), "|---" * len(columns) + "|"]
        for (method, times, epochs, notes), group in sorted(grouped(mine).items(), key=lambda g: g[0][1]):
            title = METHODS[method].title + (f" ({notes})" if notes else "")
            size = f"{times:g}x" if METHODS[method].of_file else ""
            lines.append(row([size, title, f"{epochs:g}", *measured(group)]))
            for form, words in (("int8", "torch's int8 of it"), ("rounded", "kruify's int8 of it")):
                if all(form in r for r in group):
                    own = [{"metric": metric, **r[form]} for r in group]
                    lines.append(row(["", f"{title}: {words}", "", *measured(own)]))
        lines.append("")
    return lines


def measured(group: list[Row]) -> list[str]:
    """Cells: bytes, metric, training loss, seeds, latency."""
    sizes = [r["bytes"] for r in group]
    return [f"{statistics.mean(sizes):,.0f}", spread(group, "test"), *loss_seeds_latency(group)]


def loss_seeds_latency(group: list[Row]) -> list[str]:
    losses = [r["train_loss"] for r in group if "train_loss" in r]
    speed = group[0].get("latency_ms_per_step")
    latency = f"{speed['1']:.3f} / {speed['32']:.3f}" if speed else ""
    return [f"{statistics.mean(losses):.3f}" if losses else "", str(len(group)), latency]


def ablations(runs: dict[str, Row]) -> list[str]:
    """The default recipe with one thing changed at a time."""
    task = next(iter(ABLATIONS.values())).task
    lines = [f"## What each ingredient of the default recipe is worth ({task}, 16x, one seed)", ""]
    lines += [row([task, "valid", "test"]), "|---|---|---|"]
    for title, run in ABLATIONS.items():
        r = runs.get(run.key)
        lines.append(row([title, *(f"{r[s][r['metric']]:.3f}" if r else "not run yet" for s in ("valid", "test"))]))
    return lines


def eight_bits(runs: list[Row]) -> list[str]:
    """What storage in int8 costs: of the dense network as it is, of a small file after training and in training."""
    columns = ["task", "network", "bytes of the file", "float32", "rounded afterwards", "rounded in training", "seeds"]
    lines = ["## Eight bits", "", "Metrics on test; no teacher.", "", row(columns), "|---" * len(columns) + "|"]
    for task in TASKS:
        mine = [r for r in runs if r["task"] == task]
        metric = [r["metric"] for r in mine][:1]

        def of(method: str, key: str, mine: list[Row] = mine, metric: list[str] = metric) -> str:
            found = [r[key] if key == "test" else r[key]["test"] for r in mine if r["method"] == method and key in r]
            return spread([{"metric": metric[0], "test": f} for f in found], "test") if found else ""

        for method, title in (("int8", "dense, torch's int8"), ("int8-own", "dense, kruify's int8")):
            group = [r for r in mine if r["method"] == method and "bytes" in r]
            if group:
                size = f"{group[0]['bytes']:,}"
                lines.append(row([task, title, size, of(method, "dense"), of(method, "test"), "", str(len(group))]))
        if group := [r for r in mine if r["method"] == "file-int8"]:
            small = f"{group[0]['times']:g}x smaller file"
            after = of("file-float", "test"), of("file-float", "rounded"), of("file-int8", "test")
            lines.append(row([task, small, f"{group[0]['bytes']:,}", *after, str(len(group))]))
    return lines


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean(group: list[Row], split: str) -> float:
    return statistics.mean(r[split][r["metric"]] for r in group)


def spread(group: list[Row], split: str) -> str:
    values = [r[split][r["metric"]] for r in group]
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"
