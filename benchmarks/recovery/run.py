"""How much accuracy fine-tuning brings back: every method, every budget, every task, run by run.

    python benchmarks/recovery/run.py                           the whole grid, the most informative runs first
    python benchmarks/recovery/run.py g2p:low-rank:16:0:5       single runs: task:method:times:seed:epochs:changes
    python benchmarks/recovery/run.py --list                    the grid, and what of it is done
    python benchmarks/recovery/run.py --report                  results.md from what is done
    python benchmarks/recovery/run.py --latency                 measure what is done by bytes at B=1 and 32

A finished run is one line of <task>/runs.jsonl, which git keeps; it is not run again. An interrupted run continues
where it stood. Weights and states lie in --cache, and can be made again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import latency  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from grid import CONVERGED, METHODS, TASKS, Run, grid  # noqa: E402
from measurements import Row, read, store  # noqa: E402
from train import CACHE, train, weights_file  # noqa: E402

from kruify.errors import KruifyError  # noqa: E402
from kruify.progress import Progress  # noqa: E402


def runs_file(task: str) -> Path:
    return HERE / task / "runs.jsonl"


def known(run: Run) -> Row | None:
    return next((row for row in read(runs_file(run.task)) if row["run"] == run.key), None)


def tell() -> Progress:
    last = [""]

    def progress(done: float, total: float, phase: str) -> None:
        epoch = phase.partition(":")[0]
        if epoch != last[0] or done == total:
            last[0] = epoch
            print(f"  step {done:.0f}/{total:.0f}: {phase}", flush=True)

    return progress


def train_all(runs: list[Run], cache: Path, until: float) -> None:
    for run in runs:
        if known(run):
            continue
        if time.time() > until:
            print("out of time")
            return
        teacher, needed = run.teacher, [run]
        made_here = METHODS[run.method].start in ("scratch", "smaller") or TASKS[run.task].published
        if not made_here and not weights_file(teacher, cache).exists():
            needed = [teacher, run]  # its row may come from another machine; its weights are needed here
        for one in needed:
            print(one.key, flush=True)
            try:
                row = train(one, cache, tell(), known)
            except KruifyError as error:
                print(f"  left out: {error}")
                break
            if one == run or not known(one):
                store(runs_file(one.task), row, "run")
            print(f"  valid {row['valid']} test {row['test']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="task:method:times:seed:epochs:changes; all of the grid if none")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so long")
    parser.add_argument("--list", action="store_true", help="print the grid and what is done")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--latency", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = [Run.parse(text) for text in args.runs] or grid()
    if args.list:
        for run in runs:
            print("done" if known(run) else "    ", run.key)
        return
    if args.latency:
        for task in TASKS:
            if rows := [row for row in read(runs_file(task)) if METHODS[row["method"]].dense == CONVERGED]:
                latency.measure(rows)
                for row in rows:
                    store(runs_file(task), row, "run")
    elif not args.report:
        train_all(runs, args.cache, time.time() + 60 * args.minutes)
    report.write([row for task in TASKS for row in read(runs_file(task))], HERE / "results.md")


if __name__ == "__main__":
    main()
