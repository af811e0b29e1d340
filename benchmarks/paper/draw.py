"""results.md and the pictures, from the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rows import ROWS, TABLES, Table, row_of

from kruify.report.training import conditioning_svg

Entry = dict[str, Any]
PICTURED = ("copy-1000-kru", "copy-1000-lstm", "copy-200-kru", "copy-200-kru-free", "permuted-kru", "permuted-kru-free")


def draw(entries: list[Entry], folder: Path) -> None:
    """Write results.md, and a picture of the conditioning of the rows in PICTURED, to `folder`."""
    (folder / "results.md").write_text("\n".join(lines(entries)))
    for entry in entries:
        if entry["row"] in PICTURED and entry["seed"] == 0:
            (folder / f"{entry['row']}.svg").write_text(conditioning_svg(entry["history"]))


def lines(entries: list[Entry]) -> list[str]:
    found = [
        "# The paper's tasks: results",
        "",
        "Made by `python benchmarks/paper/run.py --draw` from `ledger/`; each row is one network trained once from",
        "scratch. Metrics are of the test split, looked at once, of the weights that validated best. The condition",
        "number is that of the recurrent matrix (the worst of its gates) at the start, at the end, and the largest",
        "seen at a validation.",
        "",
    ]
    for key, table in TABLES.items():
        mine = [entry for entry in entries if entry["table"] == key]
        found += [f"## {table.title}", "", table.asks, ""]
        found += _table(mine, table) if mine else ["Not run yet.", ""]
        if table.published:
            found += ["Published, by others:", ""]
            found += ["| network | figure | source |", "|---|---|---|"]
            found += [f"| {who} | {figure} | {source} |" for who, figure, source in table.published] + [""]
        found += [f"- `{entry['row']}`: {_how(entry)}" for entry in mine] + ([""] if mine else [])
    found += [
        "Figures of the paper's own plots and tables are not repeated here unless somebody else quotes them in print:",
        "we had no copy to check them against.",
        "",
    ]
    return found


def _table(entries: list[Entry], table: Table) -> list[str]:
    metric = entries[0]["metric"]
    heads = ["network", "recurrent", "in all", "steps", metric, "all metrics", "condition number", "seconds"]
    if table.target is not None:
        heads.insert(5, "reached")
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    order = {row.key: index for index, row in enumerate(ROWS)}
    for entry in sorted(entries, key=lambda e: (order[e["row"]], -e["fraction"], e["seed"])):
        value = entry["test"][metric]
        cells = [
            f"{row_of(entry['row']).title}, N = {entry['network']['hidden']}",
            f"{entry['recurrent_parameters']:,}",
            f"{entry['parameters']:,}",
            steps(entry),
            f"{value:.3g}" if value < 0.01 else f"{value:.4f}",
            ", ".join(f"{name} {v:.3g}" for name, v in entry["test"].items() if name != metric),
            condition(entry),
            f"{entry['seconds']:,.0f}",
        ]
        if table.target is not None:
            cells.insert(5, "yes" if table.target(value) else "no")
        rows.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in rows] + [""]


def steps(entry: Entry) -> str:
    """Steps done, and which part of the row's own they are where that is not all."""
    part = "" if entry["fraction"] == 1 else f" ({entry['fraction']:.0%} of {entry['all_steps']:,})"
    return f"{entry['steps']:,}{part}"


def condition(entry: Entry) -> str:
    values = [
        max(float(m["condition_number"]) for m in h["conditioning"]["matrices"])
        for h in entry["history"]
        if h["conditioning"]["matrices"]
    ]
    return f"{values[0]:.3g} → {values[-1]:.3g}, at most {max(values):.3g}" if values else ""


def _how(entry: Entry) -> str:
    recipe = ", ".join(f"{name} {value}" for name, value in entry["recipe"].items())
    factors = f", factors {entry['network']['factors']}" if entry["network"]["cell"].startswith("kru") else ""
    return (
        f"`{entry['task']}`, cell {entry['network']['cell']}{factors}; {recipe or 'the default recipe'}; seed"
        f" {entry['seed']}; {entry['machine']}, {entry['threads']} thread, commit {entry['commit']}, {entry['date']}"
    )
