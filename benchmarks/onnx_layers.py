"""Exported layers in onnxruntime: ONNX's own LSTM and GRU nodes with dense weights against the Scan with factors.

    python benchmarks/onnx_layers.py            what is missing in results/onnx_layers.jsonl (about five minutes)
    python benchmarks/onnx_layers.py --fresh    from the start
    python benchmarks/onnx_layers.py --report   the table of the stored results

T = 128, input 128, float32, one layer, dense W_ih, one thread; the best time of each, contenders taking turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import Results, best_times, restart_with_malloc_settings, threads

STEPS, INPUTS = 128, 128
PAGE = Path(__file__).with_suffix(".md")
SPECS = {"one term": "auto", "rank 8": "8*({0}x1,1x{0})", "rank 8, 3 % entries": "8*({0}x1,1x{0})+sparse:3%"}


def keys() -> list[dict[str, Any]]:
    return [
        {"kind": kind, "hidden": hidden, "batch": batch}
        for kind in ("lstm", "gru")
        for hidden in (256, 512, 1024)
        for batch in (1, 8, 32)
    ]


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(key: dict[str, Any], seconds: float) -> dict[str, float]:
    """Milliseconds of a sequence, by contender."""
    import torch

    from kruify.exporting import export_onnx
    from kruify.layers import KRUGRU, KRULSTM

    hidden = key["hidden"]
    kru, dense = {"lstm": (KRULSTM, torch.nn.LSTM), "gru": (KRUGRU, torch.nn.GRU)}[key["kind"]]
    torch.manual_seed(0)
    layers = {"dense node": dense(INPUTS, hidden)}
    layers |= {name: kru(INPUTS, hidden, factors=spec.format(hidden)) for name, spec in SPECS.items()}
    state = torch.zeros(1, key["batch"], hidden).numpy()
    feed = {"input": torch.randn(STEPS, key["batch"], INPUTS).numpy(), "h_0": state}
    if key["kind"] == "lstm":
        feed["c_0"] = state
    contenders: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, layer in layers.items():
            run = session(export_onnx(layer, Path(folder) / f"{name}.onnx").path)
            contenders[name] = lambda run=run: run.run(None, feed)
    return best_times(contenders, seconds)


def report(results: Results) -> str:
    names = ["dense node", *SPECS]
    lines = [f"| layer | batch | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row in results.rows:
        first = row["ms"]["dense node"]
        cells = [f"{first:.2f} ms", *(f"{row['ms'][n]:.2f} ms ({first / row['ms'][n]:.1f}x)" for n in SPECS)]
        lines.append(f"| {row['kind'].upper()} {row['hidden']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0, help="processor time of each row")
    arguments = parser.parse_args()
    results = Results("onnx_layers", arguments.fresh)
    if not arguments.report:
        restart_with_malloc_settings()
        with threads(1):
            for key in results.missing(keys()):
                results.add({**key, "ms": measure(key, arguments.seconds)})
                print(report(results).splitlines()[-1], file=sys.stderr)
    begin, end, old = "<!-- table -->\n", "<!-- end of table -->", PAGE.read_text()
    PAGE.write_text(f"{old.split(begin)[0]}{begin}{report(results)}\n{end}{old.split(end)[1]}")


if __name__ == "__main__":
    main()
