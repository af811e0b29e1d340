"""Is kruify ever slower than dense? The rule of kruify.layers.dispatch against both paths and torch's own layer.

    python benchmarks/dispatch_rule.py            everything that is missing in results/dispatch_rule.jsonl (4 min)
    python benchmarks/dispatch_rule.py --fresh    from the start
    python benchmarks/dispatch_rule.py --report   the table from the stored results alone

One thread, float32, T = 32, input = hidden. For each cell: the compiled kernels, the densified path, what the rule
picks, and torch.nn's layer with dense weights. Written to dispatch_rule.md, the cells that lose most first.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import Results, best_times, restart_with_malloc_settings, threads, without_grad

STEPS = 32
SPECS = ("auto", "4*auto", "16*auto", "auto+8*({h}x1,1x{h})+sparse:2%")


def keys() -> list[dict[str, Any]]:
    names = ("kind", "hidden", "batch", "spec", "what")
    cells = itertools.product(("lstm", "gru", "rnn"), (16, 64, 256, 512), (1, 8, 64), SPECS, ("forward", "training"))
    return [dict(zip(names, cell, strict=True)) for cell in cells]


def contenders(key: dict[str, Any]) -> tuple[dict[str, Callable[[], object]], str]:
    """The calls by name, and the path that the rule picks."""
    import torch
    from torch import nn

    from kruify import layers
    from kruify.layers import dispatch

    hidden = key["hidden"]
    kru_class = {"lstm": layers.KRULSTM, "gru": layers.KRUGRU, "rnn": layers.KRURNN}[key["kind"]]
    made = {
        path: kru_class(hidden, hidden, factors=key["spec"].format(h=hidden), backend=path)
        for path in ("kernel", "dense")
    }
    made["torch"] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[key["kind"]](hidden, hidden)
    x = torch.randn(STEPS, key["batch"], hidden)
    with torch.set_grad_enabled(key["what"] == "training"):
        picked = dispatch.pick(made["kernel"], STEPS, key["batch"], x)
    upstream = torch.randn(STEPS, key["batch"], hidden)

    def call(layer: nn.Module) -> Callable[[], object]:
        if key["what"] == "training":
            return lambda: layer(x)[0].backward(upstream)
        return without_grad(layer, x)

    return {name: call(layer) for name, layer in made.items()}, picked


def report(results: Results) -> str:
    machine, rows = results.about["machine"], results.rows
    lost = sorted(rows, key=lambda r: -r["ms"][r["picked"]] / min(r["ms"]["kernel"], r["ms"]["dense"]))
    slower = [r for r in rows if r["ms"][r["picked"]] > 1.1 * r["ms"]["torch"]]
    text = [
        "# The rule that picks kernel or dense\n",
        "Written by `python benchmarks/dispatch_rule.py`; numbers in results/dispatch_rule.jsonl.\n",
        f"{machine['cpu']}, {machine['backend']}, one thread, torch {machine['torch']}, commit {machine['commit']}, "
        f"load at start {machine['load_at_start']:.1f}, float32, T={STEPS}, input = hidden, seed 0.\n",
        f"{len(rows)} cells. The rule picked a path more than 10 % slower than the other in "
        f"{sum(_regret(r) > 1.1 for r in rows)}; what it picked was more than 10 % slower than torch.nn's dense "
        f"layer in {len(slower)} ({_where(slower)}). The cells with the largest loss against the better path:\n",
        "| cell | H | B | factors | | kernel ms | dense ms | torch.nn ms | picked | over the better path |",
        "|--" * 10 + "|",
    ]
    for r in lost[:15]:
        times = " | ".join(f"{r['ms'][name]:.3f}" for name in ("kernel", "dense", "torch"))
        text.append(
            f"| {r['kind']} | {r['hidden']} | {r['batch']} | {r['spec']} | {r['what']} | {times} | {r['picked']} "
            f"| {_regret(r):.2f}x |"
        )
    return "\n".join(text) + "\n"


def _where(rows: list[dict[str, Any]]) -> str:
    counts = Counter((r["kind"], r["hidden"]) for r in rows)
    return ", ".join(f"{kind} {hidden}: {count}" for (kind, hidden), count in sorted(counts.items())) or "none"


def _regret(row: dict[str, Any]) -> float:
    return float(row["ms"][row["picked"]] / min(row["ms"]["kernel"], row["ms"]["dense"]))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--seconds", type=float, default=0.4, help="per cell")
    arguments = parser.parse_args()
    restart_with_malloc_settings()
    results = Results("dispatch_rule", arguments.fresh)
    for key in [] if arguments.report else results.missing(keys()):
        torch.manual_seed(0)
        with threads(1):
            calls, picked = contenders(key)
            times = best_times(calls, arguments.seconds)
        results.add({**key, "picked": picked, "ms": {name: round(t, 4) for name, t in times.items()}})
    Path(__file__).with_name("dispatch_rule.md").write_text(report(results))


if __name__ == "__main__":
    main()
