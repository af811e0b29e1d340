"""Whether the stages of a Kronecker product gain from eight bits: the float32 product of four gates, and its stages as
products in integers, without what would go between them (transposing and rounding the middle once more than is done).

    python benchmarks/int8_stages.py           everything that is missing in results/int8_stages.jsonl (about 1 min)
    python benchmarks/int8_stages.py --report  the page from the stored results alone
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timing import HOW, RESULTS, Results, best_times, restart_with_malloc_settings, threads, without_grad

GATES = 4
PRODUCTS = {256: ((16, 16), (16, 16)), 512: ((32, 32), (16, 16)), 1024: ((32, 32), (32, 32))}
Row = dict[str, Any]


def measure(hidden: int, batch: int, seconds: float = 2.0) -> Row:
    import torch

    from kruify.ops import Layout, TermLayout

    torch.manual_seed(0)
    (p1, q1), (p2, q2) = PRODUCTS[hidden]
    factors = [torch.randn(GATES, 1, p1, q1), torch.randn(GATES, 1, p2, q2)]
    gates = tuple(range(GATES))
    layout = Layout(GATES, hidden, hidden, (), (TermLayout(2, gates),)).encode()
    ops, x = torch.ops.kruify, torch.randn(batch, hidden)
    calls = {"float32": without_grad(ops.kron_matmul_forward, x, factors, None, None, None, None, layout)}
    # All gates read x by their own second factor; each has its own first one for what comes out.
    second, first = factors[1].reshape(-1, q2), factors[0].squeeze(1)
    one = [GATES, p2, q2, 0, *[0, q2] * GATES]
    packed, inputs = ops.int8_pack(None, second, one), x.reshape(-1, q2)
    two = [1, p1, q1, 0, 0, q1]
    others, middle = [ops.int8_pack(None, gate, two) for gate in first], torch.randn(batch * p2, q1)

    def stages() -> None:
        ops.int8_linear(inputs, packed, one)
        for other in others:
            ops.int8_linear(middle, other, two)

    calls["int8"] = without_grad(stages)
    with threads(1):
        found = best_times(calls, seconds)
    return {"hidden": hidden, "batch": batch, "us": {name: round(1e3 * t, 2) for name, t in found.items()}, "seed": 0}


def report(results: Results) -> str:
    m = results.about["machine"]
    lines = [
        "# Stages of Kronecker products in eight bits",
        "",
        "Written by `python benchmarks/int8_stages.py --report`; numbers in results/int8_stages.jsonl.",
        "",
        f"{m['cpu']}, {m['backend']}, int8 by {results.about['int8']}, torch {m['torch']}, commit {m['commit']}, "
        f"seed 0, one thread, load at the start {m['load_at_start']:.1f}. {HOW}",
        "",
        "Microseconds of W x for four gates, one Kronecker product each. `int8` is what integers take at the least: the"
        " products alone, each vector rounded as it comes, nothing transposed, in five calls of an operator instead of"
        " one.",
        "",
        "| units | factors | batch | float32 | int8 | int8 faster |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.rows:
        us, factors = row["us"], ", ".join(f"{p}x{q}" for p, q in PRODUCTS[row["hidden"]])
        cells = [row["hidden"], factors, row["batch"], us["float32"], us["int8"], f"{us['float32'] / us['int8']:.2f}x"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.report:
        restart_with_malloc_settings()
    results = Results("int8_stages", args.fresh)
    if not args.report:
        from kruify.ops import backend_info

        results.about["int8"] = backend_info()["int8"]
        for key in results.missing([{"hidden": h, "batch": b} for h in PRODUCTS for b in (1, 8, 32)]):
            results.add(measure(**key))
            print(results.rows[-1], flush=True)
    (Path(RESULTS).parent / "int8_stages.md").write_text(report(results))


if __name__ == "__main__":
    main()
