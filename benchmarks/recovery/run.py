"""How much accuracy fine-tuning brings back: every method, every budget, every task, cell by cell.

    python benchmarks/recovery/run.py                           the whole grid, most informative cells first
    python benchmarks/recovery/run.py g2p:low-rank:16:0:5       single cells: task:method:times:seed:epochs:changes
    python benchmarks/recovery/run.py --draw                    tables and pictures from what is finished
    python benchmarks/recovery/run.py --latency                 measure finished cells at B=1 and B=32 (on an idle
    machine)

A finished cell is one JSON file in ledger/, which git keeps; it is not run again. An interrupted cell continues where
it stood. Weights and states lie in --cache, and can be made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ledger  # noqa: E402
import torch  # noqa: E402
from cells import build, latency, run, weights_file  # noqa: E402
from draw import draw  # noqa: E402
from grid import METHODS, TASKS, Cell, grid  # noqa: E402

from kruify.convert import swap  # noqa: E402
from kruify.errors import TaskError  # noqa: E402
from kruify.finetune import Progress  # noqa: E402
from kruify.plan import Plan  # noqa: E402
from kruify.task import load_task  # noqa: E402

LEDGER = HERE / "ledger"


def ledger_file(cell: Cell) -> Path:
    return LEDGER / f"{cell.key}.json"


def finished(cell: Cell) -> bool:
    return ledger_file(cell).exists()


def known(cell: Cell) -> dict[str, Any] | None:
    return json.loads(ledger_file(cell).read_text()) if finished(cell) else None


def report(cell: Cell) -> Any:
    last = [0]

    def on_progress(p: Progress) -> None:
        if p.epoch != last[0] or p.step == p.steps:
            last[0] = p.epoch
            left = "" if p.remaining is None else f", {p.remaining / 60:.0f} min left"
            print(f"  {p.phase} {p.epoch}/{p.epochs}: loss {p.loss:.4f} {p.metrics}{left}", flush=True)

    return on_progress


def run_cells(cells: list[Cell], cache: Path, until: float) -> None:
    for cell in cells:
        if finished(cell):
            continue
        if time.time() > until:
            print("out of time")
            return
        teacher = Cell(cell.task, "dense", 1, cell.seed)
        if METHODS[cell.method].start not in ("scratch", "smaller") and not weights_file(teacher, cache).exists():
            # The ledger may know the teacher from another machine; its weights are needed here.
            print(f"{teacher.key} (the teacher)", flush=True)
            ledger.write(ledger_file(teacher), run(teacher, cache, report(teacher)))
        print(cell.key, flush=True)
        try:
            entry = run(cell, cache, report(cell), known)
        except TaskError as error:
            print(f"  left out: {error}")
            continue
        ledger.write(ledger_file(cell), entry)
        print(f"  valid {entry['valid']} test {entry['test']}", flush=True)


def measure(cache: Path) -> None:
    """Latency needs the structure alone, so cells trained on another machine can be measured here."""
    for path in sorted(LEDGER.glob("*/*/*.json")):
        entry = json.loads(path.read_text())
        if entry["method"] == "int8":
            continue
        cell = Cell(entry["task"], entry["method"], entry["times"], entry["seed"], whole=entry.get("whole", False))
        task = load_task(TASKS[cell.task].name)
        if "plan" in entry:
            model = swap(task.model(), Plan.from_json(entry["plan"]))
        else:
            model, _ = build(cell, task, task.model())
        entry["latency_ms_per_step"] = {str(b): round(latency(model, b), 4) for b in (1, 32)}
        ledger.write(path, entry)
        print(entry["cell"], entry["latency_ms_per_step"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cells", nargs="*", help="task:method:times:seed:epochs:changes; all of the grid if none is named"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "kruify-recovery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further cell after so long")
    parser.add_argument("--list", action="store_true", help="print the grid and what is finished")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--latency", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = [Cell.parse(text) for text in args.cells] or grid()
    if args.list:
        for cell in cells:
            print("done" if finished(cell) else "    ", cell.key)
    elif args.latency:
        measure(args.cache)
    elif not args.draw:
        run_cells(cells, args.cache, time.time() + 60 * args.minutes)
    if not args.list:
        draw(ledger.read_all(LEDGER), HERE)


if __name__ == "__main__":
    main()
