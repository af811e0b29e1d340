"""The paper's tasks: each network trained from scratch, row by row.

    python benchmarks/paper/run.py                              every row, the most informative first
    python benchmarks/paper/run.py copy-1000-kru jsb-gru        single rows
    python benchmarks/paper/run.py permuted-kru --fraction 0.1  a tenth of the row's steps, said so in the results
    python benchmarks/paper/run.py --list                       what there is, what is done
    python benchmarks/paper/run.py --draw                       results.md and the pictures from ledger/

A finished row is one JSON file in ledger/, which git keeps; it is not run again. An interrupted row continues where it
stood, to the same bits. States lie in --cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from draw import draw  # noqa: E402
from ledger import read_all, where_and_when, write  # noqa: E402
from rows import ROWS, Row, row_of, size_of, task_of  # noqa: E402

from kruify.errors import KruifyError  # noqa: E402
from kruify.finetune import Progress, Recipe, finetune  # noqa: E402
from kruify.finetune.feed import count_batches  # noqa: E402
from kruify.network import network_of  # noqa: E402

LEDGER = HERE / "ledger"


def name_of(row: Row, fraction: float, seed: int) -> str:
    return f"{row.key}{'' if fraction == 1 else f'-{fraction:g}'}-s{seed}"


def run(row: Row, fraction: float, seed: int, cache: Path) -> dict[str, Any]:
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
        on_progress=_tell(),
    )
    return {
        "row": row.key,
        "table": row.table,
        "fraction": fraction,
        "steps": result.steps,
        "all_steps": row.steps,
        "seed": seed,
        "task": row.task,
        "network": network_of(task),
        "recipe": row.recipe,
        "metric": task.metric,
        "recurrent_parameters": _recurrent(model),
        "parameters": size_of(task),
        "valid": result.metrics,
        "test": task.evaluate(model, "test"),
        "best_epoch": result.best_epoch,
        "history": _trimmed(result.history),
        "seconds": round(result.seconds, 1),
        **where_and_when(),
    }


def _recurrent(model: torch.nn.Module) -> int:
    """Real numbers in the recurrent matrices of the network."""
    counted = 0
    for name, parameter in model.named_parameters():
        if ".weight_hh" in name:
            counted += parameter.numel() * (2 if parameter.is_complex() else 1)
    return counted


def _trimmed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gradient through time of the first and the last validation alone, and short numbers."""
    kept = []
    for entry in history:
        found = dict(entry["conditioning"])
        if entry not in (history[0], history[-1]):
            del found["gradient"]
        kept.append({**entry, "conditioning": found})
    return _short(kept)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    return {key: _short(item) for key, item in value.items()} if isinstance(value, dict) else value


def _tell() -> Any:
    last = [-1]

    def on_progress(p: Progress) -> None:
        if p.epoch != last[0] or p.step == p.steps:
            last[0] = p.epoch
            left = "" if p.remaining is None else f", {p.remaining / 60:.0f} min left"
            print(f"  step {p.step}/{p.steps}: loss {p.loss:.5f} {p.metrics}{left}", flush=True)

    return on_progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="keys of rows; all if none is named")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps; the learning rate ends with them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "kruify-paper")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further row after so long")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    until = time.time() + 60 * args.minutes
    rows = [row_of(key) for key in args.rows] or sorted(ROWS, key=lambda row: row.rank)
    for row in rows:
        name = name_of(row, args.fraction, args.seed)
        file = LEDGER / f"{name}.json"
        if args.list:
            print("done" if file.exists() else "    ", name)
        if args.list or args.draw or file.exists() or time.time() > until:
            continue
        print(name, flush=True)
        try:
            entry = run(row, args.fraction, args.seed, args.cache)
        except KruifyError as error:
            print(f"  left out: {error}")
            continue
        write(file, entry)
        (args.cache / name / "state.pt").unlink(missing_ok=True)  # a changed row begins anew
        print(f"  valid {entry['valid']} test {entry['test']}", flush=True)
    if not args.list:
        draw(read_all(LEDGER), HERE)


if __name__ == "__main__":
    main()
