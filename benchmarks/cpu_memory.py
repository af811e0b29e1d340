"""Memory that one training step takes: KRU layers against torch.nn's, the peak above the layer and its input.

    python benchmarks/cpu_memory.py            what is missing in results/cpu_memory.jsonl (all of it: 6 min)
    python benchmarks/cpu_memory.py --fresh    from the start
    python benchmarks/cpu_memory.py --report   the table from the stored results alone

Each figure is one forward and backward in a process of its own, one thread, float32, input 128, one layer, balanced two
factors, one term. It holds activations, gradients of parameters and input, and every buffer; parameters, input and
libraries are there before (a short sequence runs first). malloc gives large blocks back at once, so that the peak is
what was in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import Results

INPUTS = 128
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
Row = dict[str, Any]


def keys() -> list[Row]:
    cells = itertools.product(("lstm", "gru", "rnn"), (256, 512, 1024, 2048), (1, 32), (128, 1024))
    names = ("kind", "hidden", "batch", "steps")
    # The largest one takes nn.GRU minutes, and more memory than a small machine has.
    return [dict(zip(names, c, strict=True)) for c in cells if c[1:] != (2048, 32, 1024)]


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_here(kind: str, hidden: int, batch: int, steps: int, which: str) -> int:
    """Peak of a training step above what is there before it, in bytes."""
    import torch

    from kruify import layers

    torch.manual_seed(0)
    name = kind.upper()
    layer_class = getattr(layers, f"KRU{name}") if which == "kruify" else getattr(torch.nn, name)
    layer = layer_class(INPUTS, hidden)
    x = torch.randn(steps, batch, INPUTS, requires_grad=True)

    def step(x: Any) -> None:
        layer(x)[0].sum().backward()

    step(torch.randn(2, batch, INPUTS, requires_grad=True))
    layer.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status("VmRSS")
    step(x)
    return status("VmHWM") - before


def measure(key: Row) -> Row:
    peaks = {}
    for which in ("kruify", "torch"):
        command = [sys.executable, __file__, "--cell", json.dumps([*key.values(), which])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | MALLOC)
        peaks[which] = int(done.stdout)
    return {**key, "bytes": peaks}


def report(results: Results) -> str:
    machine, rows = results.about["machine"], results.rows
    worse = [r for r in rows if _ratio(r) > 1]
    text = [
        "# Memory of a training step on the CPU\n",
        "Written by `python benchmarks/cpu_memory.py`; numbers in results/cpu_memory.jsonl."
        " What is in a figure is told at the top of the script.\n",
        f"{machine['cpu']}, torch {machine['torch']}, {machine['backend']}, commit {machine['commit']}.\n",
        f"More than torch.nn's layer in {len(worse)} of {len(rows)} cells"
        + (f", at most {max(map(_ratio, rows)):.2f} of it.\n" if rows else ".\n"),
        "| layer | H | B | T | kruify MB | torch.nn MB | kruify / torch.nn |",
        "|--" * 7 + "|",
    ]
    for r in rows:
        cells = [r["kind"].upper(), r["hidden"], r["batch"], r["steps"]]
        cells += [f"{r['bytes'][which] / 1e6:.1f}" for which in ("kruify", "torch")]
        text.append("| " + " | ".join(map(str, cells)) + f" | {_ratio(r):.2f} |")
    return "\n".join(text) + "\n"


def _ratio(row: Row) -> float:
    return float(row["bytes"]["kruify"] / row["bytes"]["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(measure_here(*json.loads(options.cell)))
        return
    results = Results("cpu_memory", options.fresh)
    if not options.report:
        for key in results.missing(keys()):
            row = measure(key)
            print(*key.values(), f"{_ratio(row):.2f}", file=sys.stderr, flush=True)
            results.add(row)
    Path(__file__).with_name("cpu_memory.md").write_text(report(results))


if __name__ == "__main__":
    main()
