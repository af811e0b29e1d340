"""The Kronecker Recurrent Unit against its loop over time and against nn.LSTM, on the CPU.

    python benchmarks/kru_layers.py               everything that is missing in results/kru_layers.jsonl (about 5 min)
    python benchmarks/kru_layers.py --fresh       from the start
    python benchmarks/kru_layers.py --hidden 128 --print
    python benchmarks/kru_layers.py --report      the table from the stored results alone

The sizes are the paper's: complex state, all factors 2x2, batch 20, one layer, float32. 10 inputs over 1000 steps is
copy memory, 1 input over 784 steps an image pixel by pixel. Times are processor time on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from timing import RESULTS, Results, best_times, restart_with_malloc_settings, threads, without_grad

BATCH = 20
Row = dict[str, Any]


def keys() -> list[Row]:
    return [
        {"hidden": hidden, "steps": steps, "inputs": inputs, "what": what}
        for hidden in (128, 512)
        for steps, inputs in ((1000, 10), (784, 1))
        for what in ("forward", "training")
    ]


def equal_lstm(parameters: int, inputs: int) -> int:
    """The hidden size whose nn.LSTM has no fewer parameters: 4 h (h + inputs + 2)."""
    hidden = 1
    while 4 * hidden * (hidden + inputs + 2) < parameters:
        hidden += 1
    return hidden


def contenders(key: Row) -> tuple[dict[str, Callable[[], object]], Row]:
    import torch
    from torch import nn

    from kruify.layers import KRU

    torch.manual_seed(0)
    unit = KRU(key["inputs"], key["hidden"], backend="kernel")
    parameters = sum(p.numel() * (2 if p.is_complex() else 1) for p in unit.parameters())
    small = equal_lstm(parameters, key["inputs"])
    layers: dict[str, nn.Module] = {
        "kruify": unit,
        "lstm_same_size": nn.LSTM(key["inputs"], key["hidden"]),
        "lstm_same_parameters": nn.LSTM(key["inputs"], small),
        "loop": KRU(key["inputs"], key["hidden"], backend="reference"),
    }
    x = torch.randn(key["steps"], BATCH, key["inputs"])

    def call(layer: nn.Module) -> Callable[[], object]:
        if key["what"] == "forward":
            return without_grad(layer, x)
        with torch.no_grad():
            upstream = torch.randn_like(layer(x)[0])
        return lambda: layer(x)[0].backward(upstream)

    calls = {name: call(layer) for name, layer in layers.items()}
    return calls, {"parameters": parameters, "lstm_hidden": small}


def measure(key: Row, seconds: float) -> Row:
    with threads(1):
        calls, sizes = contenders(key)
        times = best_times(calls, seconds)
    return {**key, **sizes, "ms": {name: round(t, 3) for name, t in times.items()}}


def report(results: Results) -> str:
    """A Markdown table of times and ratios."""
    m = results.about["machine"]
    text = [
        "# The Kronecker Recurrent Unit on the CPU\n",
        "Written by `python benchmarks/kru_layers.py --report`; numbers in results/kru_layers.jsonl. Processor time of"
        " one thread, the best of interleaved runs.\n",
        f"{m['cpu']}, AVX-512 {'yes' if m['avx512'] else 'no'}, torch {m['torch']}, commit {m['commit']}. Complex"
        f" state of N units, all factors 2x2, batch {BATCH}, float32, one layer; training is forward and backward."
        " `x` = times faster than: the loop over time in torch (what ran before the kernels), nn.LSTM of N units,"
        " and an nn.LSTM with no fewer parameters than the KRU layer.\n",
        "| N | steps | inputs | parameters | | ms | loop ms | over loop | LSTM of N: ms | over it"
        " | LSTM of as many parameters | ms | over it |\n" + "|--" * 13 + "|",
    ]
    for r in results.rows:
        ms = r["ms"]
        cells = [r["hidden"], r["steps"], r["inputs"], r["parameters"], r["what"], f"{ms['kruify']:.3g}"]
        cells += [f"{ms['loop']:.4g}", f"{ms['loop'] / ms['kruify']:.0f}x"]
        cells += [
            f"{ms['lstm_same_size']:.3g}",
            f"{ms['lstm_same_size'] / ms['kruify']:.1f}x",
            f"H = {r['lstm_hidden']}",
        ]
        cells += [f"{ms['lstm_same_parameters']:.3g}", f"{ms['lstm_same_parameters'] / ms['kruify']:.1f}x"]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--print", action="store_true", help="print rows, store nothing")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--seconds", type=float, default=6.0, help="for one row")
    options = parser.parse_args()
    restart_with_malloc_settings()
    results = Results("kru_layers", options.fresh)
    if not options.report:
        wanted = [k for k in keys() if not options.hidden or k["hidden"] == options.hidden]
        for key in wanted if options.print else results.missing(wanted):
            row = measure(key, options.seconds)
            times = " ".join(f"{name} {t:.1f}" for name, t in row["ms"].items())
            print(*key.values(), f"ms: {times}", file=sys.stderr, flush=True)
            if not options.print:
                results.add(row)
    if not options.print:
        (RESULTS.parent / "kru_layers.md").write_text(report(results))


if __name__ == "__main__":
    main()
