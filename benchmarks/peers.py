"""Layers in eight bits against what others make of the dense layer: torch, torch's dynamic int8, ONNX Runtime, its
dynamic int8, OpenVINO.

    python benchmarks/peers.py               everything that is missing in results/peers.jsonl (about 12 min)
    python benchmarks/peers.py --only lstm --hidden 512
    python benchmarks/peers.py --report      the page from the stored results alone

T = 128, input 128, one layer, inference. Ours: all weights stored as int8, W_ih dense; W_hh dense, or of low rank with
its gates stacked, at 16x fewer bytes and 16x fewer numbers. Needs the extra `bench`; without OpenVINO its column is
empty.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from measurements import commit
from timing import HOW, RESULTS, Results, best_times, restart_with_malloc_settings, threads, without_grad

STEPS, INPUTS, SEED = 128, 128, 0
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
OURS = ("dense int8", "16x bytes", "16x numbers")
PEERS = ("torch", "torch int8", "ORT", "ORT int8", "OpenVINO")
# How many times as fast as the best peer ours shall be, by batch: LSTM and GRU of 512 and 1024.
GOALS = {"16x bytes": {1: 2.5, 8: 1.8, 32: 1.8}, "16x numbers": {1: 3.5, 8: 2.5, 32: 2.5}, "dense int8": {}}
Row = dict[str, Any]
Contender = Callable[[], object]


def keys() -> list[Row]:
    """LSTM and GRU first: they have goals. Two threads at one size."""
    shapes = [(kind, hidden) for kind in GATES for hidden in (512, 256, 1024, 128)]
    rows = [(kind, hidden, batch, 1) for kind, hidden in shapes for batch in (1, 8, 32)]
    rows += [(kind, 512, batch, 2) for kind in GATES for batch in (1, 8, 32)]
    return [dict(zip(("kind", "hidden", "batch", "threads"), row, strict=True)) for row in rows]


def rank(kind: str, hidden: int, what: str) -> int:
    """Of stacked low rank: W_hh of float32 takes gates * hidden^2 numbers, one product (gates + 1) * hidden."""
    gates = GATES[kind]
    return gates * hidden // (gates + 1) // (4 if what == "16x bytes" else 16)


def ours(kind: str, hidden: int, what: str) -> Any:
    from kruify import layers
    from kruify.layers.storage import mark

    rows, stacked = GATES[kind] * hidden, "stacked:" if GATES[kind] > 1 else ""
    factors = {} if what == "dense int8" else f"{stacked}{rank(kind, hidden, what)}*({rows}x1,1x{hidden})"
    layer = getattr(layers, f"KRU{kind.upper()}")(INPUTS, hidden, factors=factors)
    mark(layer, {"weight_ih_l0": "int8", "weight_hh_l0": "int8"})
    return layer.eval()


def contenders(key: Row) -> dict[str, Contender]:
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    kind, hidden = key["kind"], key["hidden"]
    x = torch.randn(STEPS, key["batch"], INPUTS)
    dense = getattr(nn, kind.upper())(INPUTS, hidden).eval()
    found = {what: without_grad(ours(kind, hidden, what), x) for what in OURS}
    found["torch"] = without_grad(dense, x)
    if kind != "rnn":  # torch has none of it
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {type(dense)})
        found["torch int8"] = without_grad(quantised, x)
    return found | others(dense, x, key)


def others(dense: Any, x: Any, key: Row) -> dict[str, Contender]:
    import tempfile
    from pathlib import Path

    import onnxruntime
    import torch
    from onnxruntime.quantization import quantize_dynamic

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = dense

        def forward(self, x: Any) -> Any:
            return self.layer(x)[0]

    def session(file: Path) -> Contender:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = key["threads"]
        made = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: made.run(None, {"x": given})

    given, found = np.ascontiguousarray(x.numpy()), {}
    with tempfile.TemporaryDirectory() as folder:
        file, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(First().eval(), (x,), file, dynamo=False, opset_version=17, input_names=["x"])
        found["ORT"] = session(file)
        if key["kind"] == "lstm":  # it leaves GRU and RNN in float32
            quantize_dynamic(file, small)
            found["ORT int8"] = session(small)
        try:
            import openvino
        except ImportError:
            return found
        hints = {"INFERENCE_NUM_THREADS": key["threads"], "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.Core().compile_model(file, "CPU", hints).create_infer_request()
        found["OpenVINO"] = lambda: request.infer({"x": given})
    return found


def measure(key: Row, seconds: float) -> Row:
    with threads(key["threads"]):
        found = best_times(contenders(key), seconds, key["threads"])
    return {**key, "ms": {name: round(t, 4) for name, t in found.items()}, "seed": SEED, "commit": commit()}


def multiply_rate() -> float:
    """Multiply-adds per nanosecond of the eight-bit product of many vectors with a matrix in the L2 cache, 1 thread."""
    import torch

    import kruify.ops  # noqa: F401

    layout = [1, 1024, 256, 0, 0, 256]
    packed, x = torch.ops.kruify.int8_pack(None, torch.randn(1024, 256), layout), torch.randn(96, 256)
    with threads(1):
        call = {"product": lambda: torch.ops.kruify.int8_linear(x, packed, layout)}
        return x.numel() * 1024 / best_times(call, 2.0)["product"] / 1e6


def multiply_adds(key: Row, what: str) -> float:
    rows = GATES[key["kind"]] * key["hidden"]
    recurrent = rows * key["hidden"]
    if what != "dense int8":
        recurrent = rank(key["kind"], key["hidden"], what) * (rows + key["hidden"])
    return float(STEPS * key["batch"] * (recurrent + rows * INPUTS))


def best_peer(row: Row) -> str:
    return min((name for name in PEERS if name in row["ms"]), key=lambda name: row["ms"][name])


def report(results: Results) -> str:
    text = [
        "# Eight-bit layers and their peers\n",
        "Written by `python benchmarks/peers.py --report`; numbers in results/peers.jsonl and, of an older machine,"
        " results/peers_avx2.jsonl, each line with its commit and seed."
        f" {HOW} T={STEPS}, input {INPUTS}, one layer, inference, milliseconds.\n",
        "Ours store and compute all weights as int8: W_ih dense, W_hh dense or stacked low rank at 16x fewer bytes or"
        " numbers than in float32. `x` = times faster than the best peer, which stands in italics;"
        " `at most`: the same if our products ran as fast as one of many vectors with a matrix in the L2 cache, and all"
        " else took no time. torch has no int8 RNN, ONNX Runtime no int8 GRU or RNN.\n",
        *machine(results),
        "The rows of two threads, wall-clock time, are from an hour in which nothing else ran; a turn was one call.\n",
        "Dense layers of 128 and 256 units in batches of 1 are behind ONNX Runtime's by what surrounds the products. Of"
        " the 215 us that an LSTM of 128 takes alone, 45 are Python (most of it: whether the weights still are those"
        " that were packed), 11 the operator's call, 45 the product with x, and 0.9 a step: 0.65 to read W_hh from the"
        " L2 cache, which delivers 110 GB/s, 0.15 the gates. Tried without gain: W_hh read from its end in every second"
        " step, asked for ahead while the gates are computed, larger tiles of the product with x.\n",
        *machine(Results("peers_avx2")),
        "AVX2 has no such product: two of its instructions (vpmaddubsw and vpmaddwd) take as long as those of float32,"
        " so dense int8 layers save memory and hardly time. That machine had other work meanwhile; a turn was one call."
        " AVX-VNNI and ARM have not been measured.",
    ]
    return "\n".join(text) + "\n"


def machine(results: Results) -> list[str]:
    """Section of one machine."""
    about, rows = results.about, results.rows
    m, rate = about["machine"], about["multiply_rate"]
    text = [
        f"## {m['cpu']}, {about['int8']}\n",
        f"{m['cores']} cores, torch {m['torch']}, load at the start {m['load_at_start']:.1f},"
        f" {rate:.1f} multiply-adds a nanosecond in such a product of one thread. {len(rows)} of {len(keys())} rows.\n",
        *summary(rows),
    ]
    for count in sorted({r["threads"] for r in rows}):
        made = ", ".join(sorted({r["commit"] for r in rows if r["threads"] == count}))
        text.append(f"\n{count} thread{'s' * (count > 1)}, commit {made}:\n")
        ratios = [column for what in OURS for column in (what, "x", "at most")]
        text.append("| layer | H | B | " + " | ".join((*PEERS, *ratios)) + " |")
        text.append("|--" * (3 + len(PEERS) + len(ratios)) + "|")
        for r in (r for r in rows if r["threads"] == count):
            text.append("| " + " | ".join(cells(r, rate)) + " |")
    return [*text, ""]


def cells(row: Row, rate: float) -> list[str]:
    ms, peer = row["ms"], best_peer(row)
    found = [row["kind"].upper(), str(row["hidden"]), str(row["batch"])]
    for name in PEERS:
        number = f"{ms[name]:.3g}" if name in ms else ""
        found.append(f"*{number}*" if name == peer else number)
    for what in OURS:
        limit = ms[peer] * rate * 1e6 / multiply_adds(row, what) * row["threads"]
        found += [f"{ms[what]:.3g}", f"{ms[peer] / ms[what]:.2f}x", f"{limit:.1f}x"]
    return found


def summary(rows: list[Row]) -> list[str]:
    """How many goals were met."""
    text = []
    for what, goals in GOALS.items():
        counted = [r for r in rows if r["threads"] == 1 and r["kind"] != "rnn" and r["hidden"] in (512, 1024)]
        met = [r for r in counted if r["batch"] in goals and _ratio(r, what) >= goals[r["batch"]]]
        behind = [_name(r) for r in rows if _ratio(r, what) < 1]
        aim = ", ".join(f"{ratio:g}x at batch {batch}" for batch, ratio in goals.items())
        goal = f"our aim, {aim} (LSTM, GRU, 512, 1024, one thread), met in {len(met)} of {len(counted)} cells; "
        text.append(f"- {what}: {goal if goals else ''}behind the best peer in {len(behind)} of {len(rows)}"
                    + (f" ({'; '.join(behind)})" if behind else ""))  # fmt: skip
    return text


def _name(row: Row) -> str:
    threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
    return f"{row['kind'].upper()} {row['hidden']} B={row['batch']}{threads}"


def _ratio(row: Row, what: str) -> float:
    return float(row["ms"][best_peer(row)] / row["ms"][what])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--only", help="lstm, gru or rnn")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="for one row")
    options = parser.parse_args()
    restart_with_malloc_settings()
    warnings.filterwarnings("ignore")
    results = Results("peers", options.fresh)
    if not options.report:
        from kruify.ops import backend_info

        results.about.setdefault("int8", backend_info()["int8"])
        results.about.setdefault("multiply_rate", round(multiply_rate(), 2))
        wanted = [
            key
            for key in keys()
            if (not options.only or key["kind"] == options.only) and options.hidden in (None, key["hidden"])
        ]
        for key in results.missing(wanted):
            row = measure(key, options.seconds)
            print(*key.values(), row["ms"], file=sys.stderr, flush=True)
            results.add(row)
    (RESULTS.parent / "peers.md").write_text(report(results))


if __name__ == "__main__":
    main()
