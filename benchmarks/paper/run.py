"""The paper's tasks: each network trained from scratch, row by row.

    python benchmarks/paper/run.py                              every row, the most informative first
    python benchmarks/paper/run.py copy-1000-kru jsb-gru        single rows
    python benchmarks/paper/run.py permuted-kru --fraction 0.1  a tenth of the row's steps, said so in the results
    python benchmarks/paper/run.py --list                       what there is, what is done
    python benchmarks/paper/run.py --report                     results.md from what is done

A finished run is one line of runs.jsonl, which git keeps; it is not run again. An interrupted run continues where it
stood, to the same bits. States lie in --cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import report  # noqa: E402
import torch  # noqa: E402
from measurements import Row as Run  # noqa: E402
from measurements import read, store, where_and_when  # noqa: E402
from rows import ROWS, Row, row_of, size_of, task_of  # noqa: E402

from kruify.analysis.counts import count_network  # noqa: E402
from kruify.conversion.network import network_of  # noqa: E402
from kruify.errors import KruifyError  # noqa: E402
from kruify.progress import Progress  # noqa: E402
from kruify.training import Recipe, finetune  # noqa: E402
from kruify.training.batches import count_batches  # noqa: E402

RUNS = HERE / "runs.jsonl"


def name_of(row: Row, fraction: float, seed: int) -> str:
    return f"{row.key}{'' if fraction == 1 else f'-{fraction:g}'}-s{seed}"


def train(row: Row, fraction: float, seed: int, cache: Path) -> Run:
    """Train and measure one row; one that was interrupted continues where it stood."""
    task = task_of(row)
    recipe = Recipe.from_scratch().changed(seed=seed, **row.recipe)
    steps = max(1, round(fraction * row.steps))
    recipe = recipe.changed(epochs=steps / count_batches(task, seed))
    torch.manual_seed(seed)
    model = task.model()
    result = finetune(
        model,
        task,
        recipe=recipe,
        resume=cache / name_of(row, fraction, seed),
        device="cpu",
        conditioning=True,
        progress=_tell(),
    )
    measured = [entry.conditioning.matrices for entry in result.history if entry.conditioning is not None]
    conditions = [max(gate.condition_number for gate in gates) for gates in measured]
    return {
        "run": name_of(row, fraction, seed),
        "row": row.key,
        "table": row.table,
        "task": row.task,
        "network": network_of(task),
        "recipe": row.recipe,
        "seed": seed,
        "fraction": fraction,
        "steps": result.steps,
        "all_steps": row.steps,
        "metric": task.metric,
        "valid": result.metrics,
        "test": task.evaluate(model, "test"),
        "train_loss": result.history[-1].loss,
        "best_epoch": result.best_epoch,
        "condition_number": {"start": conditions[0], "end": conditions[-1], "largest": max(conditions)},
        "recurrent_parameters": count_network(model).recurrent,
        "parameters": size_of(task),
        "seconds": round(result.seconds, 1),
        **where_and_when(),
    }


def _tell() -> Progress:
    last = [""]

    def progress(done: float, total: float, phase: str) -> None:
        epoch = phase.partition(":")[0]
        if epoch != last[0] or done == total:
            last[0] = epoch
            print(f"  step {done:.0f}/{total:.0f}: {phase}", flush=True)

    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="keys of rows; all if none is named")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps; the learning rate ends with them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "kruify-paper")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further row after so long")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    until = time.time() + 60 * args.minutes
    rows = [row_of(key) for key in args.rows] or sorted(ROWS, key=lambda row: row.rank)
    for row in rows:
        name = name_of(row, args.fraction, args.seed)
        done = any(run["run"] == name for run in read(RUNS))
        if args.list:
            print("done" if done else "    ", name)
        if args.list or args.report or done or time.time() > until:
            continue
        print(name, flush=True)
        try:
            run = train(row, args.fraction, args.seed, args.cache)
        except KruifyError as error:
            print(f"  left out: {error}")
            continue
        store(RUNS, run, "run")
        (args.cache / name / "state.pt").unlink(missing_ok=True)  # a changed row begins at the start
        print(f"  valid {run['valid']} test {run['test']}", flush=True)
    if not args.list:
        report.write(read(RUNS), HERE / "results.md")


if __name__ == "__main__":
    main()
