"""The bare Kronecker product against pyfastkron, linear_operator, reshape+matmul and the dense matrix, on the CPU.

    pip install --no-deps pyfastkron linear_operator jaxtyping     the rivals (with dependencies they replace torch)
    python benchmarks/kron_matmul.py                               what is missing in results/kron_matmul.json
    python benchmarks/kron_matmul.py --fresh | --report

N from 256 to 4096 in equal factors of 2 to 64, batches of 1 to 256 rows, float32, one thread; forward, and forward +
backward to the input and every factor. The dense rival gets its matrix ready made. "nothing" is no rival: a node of
autograd's graph that takes the same tensors and computes nothing, what torch itself costs around any answer in Python.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

from timing import HOW, RESULTS, Ledger, best_times, restart_with_malloc_settings, threads, without_grad

Row = dict[str, Any]
NO_RIVALS = ("kruify", "nothing")


def keys() -> list[Row]:
    rows = []
    for what in ("forward", "training"):
        for n in (256, 512, 1024, 2048, 4096):
            for k in (2, 4, 8, 16, 32, 64):
                if round(math.log(n, k), 6).is_integer():
                    rows += [{"n": n, "factor": k, "batch": b, "what": what} for b in (1, 4, 16, 64, 256)]
    return rows


def plain(x: Any, factors: list[Any]) -> Any:
    """Reshape and matmul, one factor after the other."""
    y, rows = x, x.shape[0]
    for f in reversed(factors):
        y = (y.reshape(rows, -1, f.shape[1]) @ f.mT).mT
    return y.reshape(rows, -1)


@functools.cache
def nothing() -> Callable[..., Any]:
    """(x, *factors) -> something of x's shape, a node of autograd's graph that computes nothing."""
    import torch

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, *factors: Any) -> Any:
            ctx.save_for_backward(x, *factors)
            return x.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0], *ctx.saved_tensors[1:]

    return Nothing.apply


def contenders(key: Row) -> dict[str, Callable[[], object]]:
    import torch

    from kruify.ops import kron_matmul

    k, n = key["factor"], key["n"]
    count = round(math.log(n, k))
    training = key["what"] == "training"
    factors = [(torch.randn(k, k) / k**0.5).requires_grad_(training) for _ in range(count)]
    x = torch.randn(key["batch"], n, requires_grad=training)
    dense = functools.reduce(torch.kron, [f.detach() for f in factors]).requires_grad_(training)
    found: dict[str, Callable[[], Any]] = {
        "kruify": lambda: kron_matmul(x, factors),
        "plain": lambda: plain(x, factors),
        "dense": lambda: x @ dense.mT,
    }
    try:
        from pyfastkron import fastkrontorch

        transposed = [f.detach().mT.contiguous().requires_grad_(training) for f in factors]
        found["pyfastkron"] = lambda: fastkrontorch.gemkm(x, transposed)
    except ImportError:
        pass
    try:
        from linear_operator.operators import DenseLinearOperator, KroneckerProductLinearOperator

        operator = KroneckerProductLinearOperator(*[DenseLinearOperator(f) for f in factors])
        found["linear_operator"] = lambda: operator.matmul(x.mT).mT
    except ImportError:
        pass
    want = (x.double() @ dense.double().mT).detach()
    for name, function in found.items():
        got = function()
        assert (got - want).norm() < 1e-5 * want.norm(), name
    if training:
        upstream = torch.randn(key["batch"], n)
        found["nothing"] = lambda: nothing()(x, *factors)
        return {name: (lambda f=f: f().backward(upstream)) for name, f in found.items()}

    return {name: without_grad(f) for name, f in found.items()}


def ratio(row: Row) -> float:
    """Over the best rival."""
    return min(t for n, t in row["ms"].items() if n not in NO_RIVALS) / row["ms"]["kruify"]


def report(data: dict[str, Any]) -> str:
    m = data["machine"]
    text = [
        "# The bare Kronecker product on the CPU\n",
        f"Written by `python benchmarks/kron_matmul.py --report`; numbers in results/kron_matmul.json. {HOW}\n",
        f"{m['cpu']}, AVX-512 {'yes' if m['avx512'] else 'no'}, torch {m['torch']},"
        f" commit {m['commit']}, one thread, float32.\n",
    ]
    if "note" in m:
        text.append(m["note"] + "\n")
    text.append(
        "`nothing` is no rival: a node of autograd's graph that takes the same tensors and computes nothing. Where it"
        " takes as long as the best rival, no operator with that many factors can be faster.\n"
    )
    for what in ("forward", "training"):
        rows = [r for r in data["rows"] if r["what"] == what]
        if not rows:
            continue
        mean = math.exp(sum(math.log(ratio(r)) for r in rows) / len(rows))
        slower = [r for r in rows if ratio(r) < 1]
        text.append(
            f"## {what}: {mean:.2f}x the best rival in the geometric mean of {len(rows)} cells;"
            f" slower than it in {len(slower)}\n"
        )
        names = sorted({n for r in rows for n in r["ms"]} - {"kruify"})
        text.append("| N | factors | B | kruify us | " + " | ".join(f"{n} us" for n in names) + " | over the best |")
        text.append("|--" * (5 + len(names)) + "|")
        for r in rows:
            times = [f"{1e3 * r['ms'][n]:.1f}" if n in r["ms"] else "" for n in ["kruify", *names]]
            text.append(f"| {r['n']} | {r['factor']} | {r['batch']} | " + " | ".join(times) + f" | {ratio(r):.2f}x |")
        text.append("")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--seconds", type=float, default=0.5, help="for one cell")
    options = parser.parse_args()
    restart_with_malloc_settings()
    ledger = Ledger(RESULTS / "kron_matmul.json", options.fresh)
    if not options.report:
        for key in ledger.missing(keys()):
            with threads(1):
                times = best_times(contenders(key), options.seconds)
            row = {**key, "ms": {name: round(t, 5) for name, t in times.items()}}
            print(*key.values(), f"{ratio(row):.2f}x", file=sys.stderr, flush=True)
            ledger.add(row)
    (RESULTS.parent / "kron_matmul.md").write_text(report(ledger.data))


if __name__ == "__main__":
    main()
