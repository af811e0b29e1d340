"""KRU layers against torch's own, int8 dynamic quantisation and the plain loop over factors, on the CPU.

    python benchmarks/cpu_layers.py               everything that is missing in results/cpu_layers.jsonl (about 5 min)
    python benchmarks/cpu_layers.py --fresh       from the start
    python benchmarks/cpu_layers.py --only lstm --hidden 512 --print
    python benchmarks/cpu_layers.py --report      the tables from the stored results alone

T = 128, input 128, float32, one layer, dense W_ih, balanced two factors, one term, unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from timing import HOW, RESULTS, Results, best_times, restart_with_malloc_settings, threads, without_grad

STEPS, INPUTS = 128, 128
Row = dict[str, Any]


def keys() -> list[Row]:
    """What is measured, the rows with a target first."""
    rows: list[Row] = []

    def add(
        kind: str, hidden: int, batch: int, count: int, what: str, spec: str = "auto", inputs: int = INPUTS
    ) -> None:
        rows.append(
            {
                "kind": kind,
                "hidden": hidden,
                "batch": batch,
                "threads": count,
                "spec": spec,
                "inputs": inputs,
                "what": what,
            }
        )

    for hidden in (512, 1024, 2048, 256):
        for batch in (1, 8, 32) if hidden < 2048 else (1, 8):
            add("lstm", hidden, batch, 1, "forward")
            if hidden < 2048:
                add("lstm", hidden, batch, 1, "training")
    for batch in (1, 8, 32):
        add("lstm", 1024, batch, 1, "forward", "auto/input auto", 1024)
    for spec in ("4*auto", "auto+8*({h}x1,1x{h})+sparse:2%"):
        for hidden, batch in ((512, 1), (512, 8), (512, 32), (1024, 1), (1024, 8)):
            add("lstm", hidden, batch, 1, "forward", spec.format(h=hidden))
    for kind in ("gru", "rnn"):
        for hidden in (256, 512, 1024):
            for batch in (1, 8, 32):
                add(kind, hidden, batch, 1, "forward")
                add(kind, hidden, batch, 1, "training")
    everything = os.cpu_count() or 1
    for kind in ("lstm", "gru", "rnn"):
        for hidden in (512, 1024, 256, 2048):
            for batch in (1, 8, 32) if hidden < 2048 else (1, 8):
                add(kind, hidden, batch, everything, "forward")
        add(kind, 512, 128, everything, "forward")
        for batch in (1, 8, 32):
            add(kind, 512, batch, everything, "training")
            add(kind, 1024, batch, everything, "training")
    for kind in ("lstm", "gru", "rnn"):
        for hidden in (256, 512, 1024, 2048):
            add(kind, hidden, 128, 1, "forward")
        for batch in (1, 8, 32):
            add(kind, 2048, batch, 1, "forward")
        for batch in (1, 8):
            add(kind, 2048, batch, 1, "training")
        for hidden in (256, 512, 1024, 2048):
            for inputs in (16, 128):
                add(kind, hidden, 1, 1, "cell", inputs=inputs)
    rows = list({tuple(row.items()): row for row in rows}.values())
    return rows


def contenders(key: Row) -> dict[str, Callable[[], object]]:
    import torch
    from torch import nn

    from kruify import layers

    name = key["kind"].upper() + ("Cell" if key["what"] == "cell" else "")
    kru_class, dense_class = getattr(layers, f"KRU{name}"), getattr(nn, name)
    spec, _, input_factors = key["spec"].partition("/input ")
    kru = kru_class(key["inputs"], key["hidden"], factors=spec, input_factors=input_factors or None)
    dense = dense_class(key["inputs"], key["hidden"])
    if key["what"] == "cell":  # one step per call, as a stream is answered
        x, h = torch.randn(key["batch"], key["inputs"]), torch.zeros(key["batch"], key["hidden"])
        state = (h, h.clone()) if key["kind"] == "lstm" else h
        return {"kruify": without_grad(kru, x, state), "dense": without_grad(dense, x, state)}
    x = torch.randn(STEPS, key["batch"], key["inputs"])
    if key["what"] == "training":
        x.requires_grad_()
        upstream = torch.randn(STEPS, key["batch"], key["hidden"])

        def train(layer: nn.Module) -> Callable[[], object]:
            return lambda: layer(x)[0].backward(upstream)

        return {"kruify": train(kru), "dense": train(dense)}

    def infer(layer: nn.Module) -> Callable[[], object]:
        return without_grad(layer.eval(), x)

    found = {"kruify": infer(kru), "dense": infer(dense)}
    if key["kind"] != "rnn" and key["threads"] == 1 and key["spec"] == "auto":
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["int8"] = infer(
                torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {dense_class}, torch.qint8)[0]
            )
    if key["threads"] == 1 and key["batch"] in (1, 8) and key["hidden"] in (512, 1024) and key["spec"] == "auto":
        loop = kru_class(key["inputs"], key["hidden"], factors=spec, backend="reference")
        found["loop"] = infer(loop)
    return found


def measure(key: Row, seconds: float) -> Row:
    with threads(key["threads"]):
        times = best_times(contenders(key), seconds, key["threads"])
    return {**key, "ms": {name: round(t, 4) for name, t in times.items()}}


def gemm_rate() -> float:
    """GFLOP/s of oneDNN's product of two large float32 matrices on one thread: twice what `@` reaches on an AMD."""
    import torch
    from torch.utils import mkldnn

    x, layer = torch.randn(2048, 1024).to_mkldnn(), mkldnn.to_mkldnn(torch.nn.Linear(1024, 2048))
    with threads(1), torch.no_grad():
        ms = best_times({"gemm": lambda: layer(x)}, 3.0)["gemm"]
    return 2 * x.numel() * 2048 / ms / 1e6


def product_flops(row: Row) -> float:
    """What the products of a KRU layer with dense W_ih and one pair of factors cost, without activations."""
    from kruify.factors import balanced
    from kruify.ops.stages import plan

    gates, hidden = {"lstm": 4, "gru": 3, "rnn": 1}[row["kind"]], row["hidden"]
    shapes = plan(tuple(balanced(hidden, hidden, 2)), gates).shapes
    if len(shapes) == 1:  # merged into a plain matrix
        trailing, leading = 0, gates * hidden * hidden
    else:
        (p0, q0), (p1, q1) = shapes
        trailing, leading = gates * q0 * p1 * q1, gates * p0 * q0 * p1
    recurrent, inputs = trailing + leading, gates * hidden * row["inputs"]
    if row["what"] == "training":  # backward: the trailing product again, and two gradients of each
        recurrent, inputs = recurrent + 3 * trailing + 2 * leading, 3 * inputs
    return float(2 * STEPS * row["batch"] * (recurrent + inputs))


def report(results: Results) -> str:
    """Markdown tables of the ratios."""
    rows = [r for r in results.rows if r["what"] != "cell"]
    m = results.about["machine"]
    text = [
        "# KRU layers on the CPU\n",
        f"Written by `python benchmarks/cpu_layers.py --report`; numbers in results/cpu_layers.jsonl. {HOW}\n",
        f"{m['cpu']}, AVX-512 {'yes' if m['avx512'] else 'no'}, {m['cores']} cores, torch {m['torch']},"
        f" commit {m['commit']}, T={STEPS}, input {INPUTS}, float32, dense W_ih, balanced two factors, one term."
        " `x` = times faster than.\n",
    ]
    if "note" in m:
        text.append(m["note"] + "\n")
    rate = results.about.get("gemm_gflops")
    if rate:
        text.append(
            f"`at most`: over torch.nn if W_ih's and the Kronecker products ran at {rate:.0f} GFLOP/s, the rate of"
            " oneDNN's large GEMM on one thread in the same run, and activations, memory and Python took no time.\n"
        )
    text.append("torch has no int8 dynamic quantisation of nn.RNN.\n")
    for kind in ("lstm", "gru", "rnn"):
        for count in sorted({r["threads"] for r in rows}):
            chosen = [r for r in rows if r["kind"] == kind and r["threads"] == count and r["spec"] == "auto"]
            if not chosen:
                continue
            name = {"lstm": "nn.LSTM", "gru": "nn.GRU", "rnn": "nn.RNN"}[kind]
            text.append(f"## KRU-{kind.upper()}, {count} thread{'s' * (count > 1)}\n")
            text.append(
                f"| H | B | forward ms | {name} ms | over {name} | at most | over int8 | over torch loop"
                f" | training ms | {name} ms | over {name} | at most |"
            )
            text.append("|--" * 12 + "|")
            for hidden, batch in sorted({(r["hidden"], r["batch"]) for r in chosen}):
                cells = [str(hidden), str(batch)]
                forward = _find(chosen, hidden, batch, "forward")
                cells += [_ms(forward, "kruify"), _ms(forward, "dense")]
                cells += [_ratio(forward, "dense"), _bound(forward, rate)]
                cells += [_ratio(forward, other) for other in ("int8", "loop")]
                training = _find(chosen, hidden, batch, "training")
                cells += [_ms(training, "kruify"), _ms(training, "dense"), _ratio(training, "dense")]
                cells.append(_bound(training, rate))
                text.append("| " + " | ".join(cells) + " |")
            text.append("")
    others = [r for r in rows if r["spec"] != "auto"]
    if others:
        text.append("## Other structures: KRU-LSTM, forward, 1 thread\n")
        text.append(
            "| structure | input | H | B | ms | nn.LSTM ms | over nn.LSTM | against one term |\n" + "|--" * 8 + "|"
        )
        for r in others:
            plain = _find(
                [q for q in rows if q["spec"] == "auto" and q["kind"] == "lstm" and q["threads"] == 1],
                r["hidden"],
                r["batch"],
                r["what"],
            )
            cost = (
                f"{r['ms']['kruify'] / plain['ms']['kruify']:.2f}x the time" if plain and r["inputs"] == INPUTS else ""
            )
            text.append(
                f"| {r['spec']} | {r['inputs']} | {r['hidden']} | {r['batch']}"
                f" | {_ms(r, 'kruify')} | {_ms(r, 'dense')} | {_ratio(r, 'dense')} | {cost} |"
            )
    text += ["", *cell_table([r for r in results.rows if r["what"] == "cell"])]
    return "\n".join(text) + "\n"


def cell_table(rows: list[Row]) -> list[str]:
    text = [
        "## One step per call: the cells, B = 1, 1 thread\n",
        "| cell | H | input | us | torch.nn us | over torch.nn |",
        "|--" * 6 + "|",
    ]
    for r in rows:
        us = (f"{1e3 * r['ms'][name]:.1f}" for name in ("kruify", "dense"))
        size = f"KRU-{r['kind'].upper()} | {r['hidden']} | {r['inputs']}"
        text.append(f"| {size} | {' | '.join(us)} | {_ratio(r, 'dense')} |")
    return text


def _find(rows: list[Row], hidden: int, batch: int, what: str) -> Row | None:
    return next((r for r in rows if (r["hidden"], r["batch"], r["what"]) == (hidden, batch, what)), None)


def _ms(row: Row | None, name: str) -> str:
    return "" if row is None or name not in row["ms"] else f"{row['ms'][name]:.3g}"


def _ratio(row: Row | None, other: str) -> str:
    return "" if row is None or other not in row["ms"] else f"{row['ms'][other] / row['ms']['kruify']:.1f}x"


def _bound(row: Row | None, rate: float | None) -> str:
    """The largest ratio over torch.nn that the multiply-adds allow."""
    if row is None or rate is None or row["threads"] != 1:
        return ""
    return f"{row['ms']['dense'] * rate * 1e6 / product_flops(row):.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--print", action="store_true", help="print rows, store nothing")
    parser.add_argument("--only", help="lstm, gru or rnn")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--what", help="forward or training")
    parser.add_argument("--seconds", type=float, default=0.8, help="for one row")
    options = parser.parse_args()
    restart_with_malloc_settings()
    results = Results("cpu_layers", options.fresh)
    if not options.report:
        if "gemm_gflops" not in results.about:
            results.about["gemm_gflops"] = round(gemm_rate(), 1)
        wanted = [
            k
            for k in keys()
            if (not options.only or k["kind"] == options.only)
            and (not options.hidden or k["hidden"] == options.hidden)
            and (not options.what or k["what"] == options.what)
        ]
        for key in wanted if options.print else results.missing(wanted):
            row = measure(key, options.seconds)
            ratios = " ".join(f"{n} {t / row['ms']['kruify']:.2f}x" for n, t in row["ms"].items() if n != "kruify")
            print(*key.values(), f"{row['ms']['kruify']:.3f} ms", ratios, file=sys.stderr, flush=True)
            if not options.print:
                results.add(row)
    if not options.print:
        (RESULTS.parent / "cpu_layers.md").write_text(report(results))


if __name__ == "__main__":
    main()
