"""results.md from the recorded runs."""

from __future__ import annotations

from pathlib import Path

from measurements import Row as Run
from rows import ROWS, TABLES, Table, row_of


def write(runs: list[Run], page: Path) -> None:
    page.write_text("\n".join(lines(runs)))


def lines(runs: list[Run]) -> list[str]:
    found = [
        "# The paper's tasks: results",
        "",
        "Made by `python benchmarks/paper/run.py --report` from `runs.jsonl`; each row is one network trained once",
        "from scratch. Metrics are of the test split, looked at once, of the weights that validated best. The",
        "condition number is that of the recurrent matrix (the worst of its gates) at the start, at the end, and the",
        "largest seen at a validation.",
        "",
    ]
    for key, table in TABLES.items():
        mine = [run for run in runs if run["table"] == key]
        found += [f"## {table.title}", "", table.asks, ""]
        found += _table(mine, table) if mine else ["Not run yet.", ""]
        if table.published:
            found += ["Published, by others:", ""]
            found += ["| network | figure | source |", "|---|---|---|"]
            found += [f"| {who} | {figure} | {source} |" for who, figure, source in table.published] + [""]
        found += [f"- `{run['row']}`: {_how(run)}" for run in mine] + ([""] if mine else [])
    found += [
        "Figures of the paper's own plots and tables are not repeated here unless somebody else quotes them in print:",
        "we had no copy to check them against.",
        "",
    ]
    return found


def _table(runs: list[Run], table: Table) -> list[str]:
    metric = runs[0]["metric"]
    heads = ["network", "recurrent", "in all", "steps", metric, "all metrics", "condition number", "seconds"]
    if table.target is not None:
        heads.insert(5, "reached")
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    order = {row.key: index for index, row in enumerate(ROWS)}
    for run in sorted(runs, key=lambda e: (order[e["row"]], -e["fraction"], e["seed"])):
        value = run["test"][metric]
        cells = [
            f"{row_of(run['row']).title}, N = {run['network']['hidden']}",
            f"{run['recurrent_parameters']:,}",
            f"{run['parameters']:,}",
            steps(run),
            f"{value:.3g}" if value < 0.01 else f"{value:.4f}",
            ", ".join(f"{name} {v:.3g}" for name, v in run["test"].items() if name != metric),
            condition(run),
            f"{run['seconds']:,.0f}",
        ]
        if table.target is not None:
            cells.insert(5, "yes" if table.target(value) else "no")
        rows.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in rows] + [""]


def steps(run: Run) -> str:
    """Steps done, and which part of the row's own they are where that is not all."""
    part = "" if run["fraction"] == 1 else f" ({run['fraction']:.0%} of {run['all_steps']:,})"
    return f"{run['steps']:,}{part}"


def condition(run: Run) -> str:
    found = run["condition_number"]
    return f"{found['start']:.3g} → {found['end']:.3g}, at most {found['largest']:.3g}" if found else ""


def _how(run: Run) -> str:
    recipe = ", ".join(f"{name} {value}" for name, value in run["recipe"].items())
    factors = f", factors {run['network']['factors']}" if run["network"]["cell"].startswith("kru") else ""
    return (
        f"`{run['task']}`, cell {run['network']['cell']}{factors}; {recipe or 'the default recipe'}; seed"
        f" {run['seed']}; {run['machine']}, {run['threads']} thread, commit {run['commit']}, {run['date']}"
    )
