"""ONNX's own LSTM and GRU nodes with dense weights against a Scan with factors, in onnxruntime: exported layers, and
whole graphs that `convert` made small (`--form folded` and `--form scan`).

    python benchmarks/onnx_layers.py            what is missing in results/onnx_{layers,graphs}.jsonl (some minutes)
    python benchmarks/onnx_layers.py --fresh    from the start
    python benchmarks/onnx_layers.py --report   the tables of the stored results

T = 128, input 128, one thread; the best time of each, contenders taking turns. Layers: one, float32, dense W_ih.
Graphs: low rank of W_hh and W_ih in int8, at so many times fewer bytes of these matrices; random weights, seed 0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timing import Results, best_times, restart_with_malloc_settings, threads

STEPS, INPUTS = 128, 128
PAGE = Path(__file__).with_suffix(".md")
SPECS = {"one term": "auto", "rank 8": "8*({0}x1,1x{0})", "rank 8, 3 % entries": "8*({0}x1,1x{0})+sparse:3%"}


GRAPHS = {"LSTM": (2, 512), "GRU": (1, 1024)}
"""Kind -> nodes, one on the other, and hidden units."""
BATCHES = (1, 8, 32)


def keys() -> list[dict[str, Any]]:
    return [
        {"kind": kind, "hidden": hidden, "batch": batch}
        for kind in ("lstm", "gru")
        for hidden in (256, 512, 1024)
        for batch in BATCHES
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


def graph_keys() -> list[dict[str, Any]]:
    return [
        {"kind": kind, "nodes": nodes, "hidden": hidden, "smaller": smaller}
        for kind, (nodes, hidden) in GRAPHS.items()
        for smaller in (8, 16)
    ]


def save_graph(path: Path, kind: str, layers: int, hidden: int) -> None:
    """Nodes of dense random weights, one on the other."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    numbers, gates = np.random.default_rng(0), {"LSTM": 4, "GRU": 3}[kind]
    name, nodes, constants = "x", [], [numpy_helper.from_array(np.array([1]), "axis")]
    for at in range(layers):
        sizes = {"W": (1, gates * hidden, hidden if at else INPUTS), "R": (1, gates * hidden, hidden)}
        for part, shape in {**sizes, "B": (1, 2 * gates * hidden)}.items():
            array = numbers.uniform(-1, 1, shape).astype("f4") / hidden**0.5
            constants.append(numpy_helper.from_array(array, f"{part}{at}"))
        inputs = [name, *(f"{part}{at}" for part in "WRB")]
        more = {"linear_before_reset": 1} if kind == "GRU" else {}
        nodes.append(helper.make_node(kind, inputs, [f"y{at}"], name=f"rnn{at}", hidden_size=hidden, **more))
        nodes.append(helper.make_node("Squeeze", [f"y{at}", "axis"], [name := f"h{at}"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", "batch", INPUTS])
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["time", "batch", hidden])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), ir_version=8)
    model.opset_import[0].version = 17
    save(model, path)


def low_rank(rows: int, cols: int, smaller: int) -> str:
    """Of stacked gates, in as many times fewer bytes: eight bits for 32, the numbers for the rest."""
    return f"stacked:{4 * rows * cols // (smaller * (rows + cols))}*({rows}x1,1x{cols})"


def measure_graph(key: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, by batch and form."""
    import numpy as np

    import kruify
    from kruify.graphs import write_small

    kind, nodes, hidden, smaller = key.values()
    rows = {"LSTM": 4, "GRU": 3}[kind] * hidden
    both, first = (low_rank(rows, cols, smaller) for cols in (hidden, INPUTS))
    with tempfile.TemporaryDirectory() as folder:
        files = {form: Path(folder) / f"{form}.onnx" for form in ("original", "folded", "scan")}
        save_graph(files["original"], kind, nodes, hidden)
        options = {"input_factors": both, "overrides": {"rnn0.weight_ih*": first}, "dtype": "int8"}
        if nodes == 1:
            options = {"input_factors": first, "dtype": "int8"}
        made = kruify.convert(files["original"], both, output=files["folded"], **options)
        scan = [f"rnn{at}" for at in range(nodes)]
        write_small(files["original"], made.tensors, made.plan.structures(), made.storage, files["scan"], scan=scan)
        runs = {form: session(file) for form, file in files.items()}
    found = {}
    for batch in BATCHES:
        feed = {"x": np.random.default_rng(1).normal(0, 1, (STEPS, batch, INPUTS)).astype("f4")}
        contenders = {form: partial(run.run, None, feed) for form, run in runs.items()}
        found[str(batch)] = best_times(contenders, seconds)
    return found


def report_graphs(results: Results) -> str:
    lines = ["| graph | matrices | batch | original | folded | scan |", "|---|---|---|---|---|---|"]
    for row in results.rows:
        for batch, ms in row["ms"].items():
            first = ms["original"]
            cells = [f"{first:.2f} ms", *(f"{ms[n]:.2f} ms ({first / ms[n]:.2f}x)" for n in ("folded", "scan"))]
            graph = f"{row['nodes']} x {row['kind']} {row['hidden']}"
            lines.append(f"| {graph} | {row['smaller']}x smaller | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    parts = (
        ("layers", keys, measure, report),
        ("graphs", graph_keys, measure_graph, report_graphs),
    )
    for part, wanted, how, table in parts:
        results = Results(f"onnx_{part}", arguments.fresh)
        if not arguments.report:
            restart_with_malloc_settings()
            with threads(1):
                for key in results.missing(wanted()):
                    results.add({**key, "ms": how(key, arguments.seconds)})
                    print(table(results).splitlines()[-1], file=sys.stderr)
        begin, end, old = f"<!-- {part} -->\n", f"<!-- end of {part} -->", PAGE.read_text()
        PAGE.write_text(f"{old.split(begin)[0]}{begin}{table(results)}\n{end}{old.split(end)[1]}")


if __name__ == "__main__":
    main()
