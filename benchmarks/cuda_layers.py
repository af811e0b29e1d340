"""Whole layers on a GPU: kruify and cuDNN (float32, TF32, bf16), torch.compile, torch's loop; and the chip's ceilings.

    python benchmarks/cuda_layers.py --quick   LSTM 1024, 2048, 4096, B=64, T=1024: a minute or two
    python benchmarks/cuda_layers.py           H 512..4096, B 1..256, T 128 and 1024, LSTM, GRU, RNN (`make bench-gpu`)

Writes benchmarks/results/cuda_layers-<GPU>.jsonl after every measurement, so that a run that is cut short keeps what it
had, and the next one of the same commit on the same GPU goes on from there (`--fresh`: from the start), and the table
of benchmarks/cuda_layers.md. Times are medians of CUDA events, in milliseconds, input size = hidden size. Structures:
`kruify` is balanced two factors, `low_rank` stacked gates of rank H / 16, `sum` the former and low rank of H / 64,
`sparse` stacked gates of rank H / 32 and a residual of 1 %; W_ih is dense, or factored like W_hh (`factored`).
`recurrent` is the recurrence alone, on ready gates. TF32 is torch's switch, which kruify's kernels follow; bf16 is
cuDNN on bf16 weights and input, and kruify on float32 ones under autocast. `--seconds` bounds the whole run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measurements import read
from torch import Tensor, nn

from kruify import layers
from kruify import ops as ops  # registers the operators
from kruify.errors import KruifyError
from kruify.layers import kernel
from kruify.layers.matrix import KroneckerMatrix
from kruify.ops import backend_info, graphs, precision
from kruify.ops.recurrence import run_recurrence

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
PAIRS = {512: (32, 16), 1024: (32, 32), 2048: (64, 32), 4096: (64, 64)}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CASE = ("kind", "hidden", "batch", "steps", "training")  # what tells the rows apart
# Of the forward pass over cuDNN's float32, T=1024, B=64: what a layer with a dense W_ih can reach at most, for that has
# as many multiply-adds as cuDNN's recurrence, and what is wanted of the recurrence alone and with W_ih factored, too.
CEILING = {1024: 3.5, 2048: 2.6, 4096: 2.5}
WANTED_ALONE = {1024: 6.0, 2048: 9.0, 4096: 15.0}
WANTED_FACTORED = {1024: 4.0, 2048: 6.0, 4096: 10.0}
STRUCTURES = ("kruify", "low_rank", "sum", "sparse")
ON_TENSOR_CORES = ("kruify", "low_rank")  # the others run in float32 in any case


def milliseconds(function: Callable[[], object], budget: float = 1.0) -> float:
    """Median time of a call by CUDA events, after warming up; about `budget` seconds in all."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    count = max(3, min(30, int(budget / max(time.perf_counter() - begin, 1e-5))))
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in cuDNN and in matrix products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def ceilings() -> dict[str, float]:
    """What this chip does at best: GB/s of a copy, TFLOP/s of matrix products."""
    a = torch.empty(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    found = {"copy_gb_per_s": 2 * a.numel() * 4 / milliseconds(lambda: b.copy_(a)) / 1e6}
    n = 8192
    for name, dtype, allowed in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, True),
    ):
        x, y = torch.randn(n, n, device=DEVICE, dtype=dtype), torch.randn(n, n, device=DEVICE, dtype=dtype)
        with tf32(allowed):
            found[f"matmul_{name}_tflop_per_s"] = 2 * n**3 / milliseconds(lambda x=x, y=y: x @ y) / 1e9
    return found


def work(kind: str, hidden: int, batch: int, steps: int, training: bool) -> dict[str, float]:
    """Multiply-adds (x 2) and bytes from and to global memory that a whole kruify layer cannot do without."""
    gates, (rows1, rows2) = GATES[kind], PAIRS[hidden]
    rows = batch * steps
    recurrent = 2 * rows * gates * hidden * (rows1 + rows2)
    inputs = 2 * rows * hidden * gates * hidden
    moved = 4 * rows * hidden * (1 + 2 * gates + 1)  # x, the gates written and read, out
    factor = 3 if training else 1
    return {
        "recurrent_gflop": factor * recurrent / 1e9,
        "input_gflop": factor * inputs / 1e9,
        "gb": factor * moved / 1e9,
    }


def dense(kind: str, hidden: int) -> nn.Module:
    """torch's own layer."""
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
    return layer(hidden, hidden, device=DEVICE)


def spec(structure: str, kind: str, hidden: int) -> str:
    """In the factor grammar."""
    gates, (rows1, rows2) = GATES[kind], PAIRS[hidden]
    pair = f"{rows1}x{rows1},{rows2}x{rows2}"
    return {
        "kruify": pair,
        "low_rank": f"stacked:{hidden // 16}*({gates * hidden}x1,1x{hidden})",
        "sum": f"{hidden // 64}*({hidden}x1,1x{hidden})+{pair}",
        "sparse": f"stacked:{hidden // 32}*({gates * hidden}x1,1x{hidden})+sparse:1%",
    }[structure]


def ours(kind: str, hidden: int, backend: str, structure: str = "kruify", factored: bool = False) -> nn.Module:
    """The same layer with one of the structures, in W_ih, too, where it is `factored`."""
    layer = {"lstm": layers.KRULSTM, "gru": layers.KRUGRU, "rnn": layers.KRURNN}[kind]
    factors = spec(structure, kind, hidden)
    inputs = factors if factored else None
    return layer(hidden, hidden, factors=factors, input_factors=inputs, backend=backend, device=DEVICE)


def timed(layer: nn.Module, x: Tensor, training: bool, budget: float) -> float:
    """One pass through a layer, with or without derivatives."""
    if not training:
        layer.eval()
        with torch.no_grad():
            return milliseconds(lambda: layer(x), budget)
    layer.train()
    x = x.detach().requires_grad_()

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].sum().backward()

    return milliseconds(step, budget)


def recurrent(
    structure: str, kind: str, hidden: int, batch: int, steps: int, training: bool, budget: float, products: int
) -> float:
    """The recurrence alone, on ready-made gates, with products of this precision."""
    layer, gates = ours(kind, hidden, "kernel", structure), GATES[kind]
    matrix = layer.get_submodule("weight_hh_l0")
    assert isinstance(matrix, KroneckerMatrix)
    form, name = kernel.form_of(matrix), "rnn_tanh" if kind == "rnn" else kind
    x = torch.randn(steps * batch, gates * hidden, device=DEVICE).requires_grad_(training)
    h0 = torch.zeros(batch, hidden, device=DEVICE)
    first = (x, None, None, torch.full((steps,), batch), h0, h0 if kind == "lstm" else None)
    parts, parameters = matrix.parts_beside_terms(), kernel.parameters_of(matrix, form)
    bias = torch.zeros(gates * hidden, device=DEVICE, requires_grad=training)

    def step() -> None:
        kept = graphs.keeps(x, steps, batch) and kernel.goes_stepwise(matrix, h0, products)
        out = run_recurrence(form.assembly, name, False, products, first, bias, parts, parameters, kept)[0]
        if training:
            torch.autograd.grad(out.sum(), [x, *matrix.parameters(), bias])

    with torch.set_grad_enabled(training):
        return milliseconds(step, budget)


def compiled_loop(kind: str, hidden: int) -> Callable[[Tensor], object]:
    """A cell of the KRU layer through torch.compile, in a Python loop over time."""
    layer = ours(kind, hidden, "reference").eval()
    step = torch.compile(lambda x: layer(x)[0], dynamic=False)
    return lambda x: [step(x[t : t + 1]) for t in range(x.shape[0])]


def candidates(
    kind: str, hidden: int, batch: int, steps: int, training: bool, budget: float
) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, measurement) of everything that is compared."""
    x = torch.randn(steps, batch, hidden, device=DEVICE)

    def cudnn(dtype: torch.dtype, allowed: bool) -> float:
        with tf32(allowed):
            return timed(dense(kind, hidden).to(dtype), x.to(dtype), training, budget)

    def layer(
        backend: str, allowed: bool, lower: bool = False, structure: str = "kruify", factored: bool = False
    ) -> float:
        casts: AbstractContextManager[Any] = torch.autocast(DEVICE, torch.bfloat16) if lower else nullcontext()
        with tf32(allowed), casts:
            return timed(ours(kind, hidden, backend, structure, factored), x, training, budget)

    def alone(products: int, structure: str) -> float:
        with tf32(products != precision.FLOAT32):
            return recurrent(structure, kind, hidden, batch, steps, training, budget, products)

    yield "cudnn_float32", lambda: cudnn(torch.float32, False)
    for one in STRUCTURES:
        yield one, lambda one=one: layer("kernel", False, structure=one)
        yield f"{one}_recurrent", lambda one=one: alone(precision.FLOAT32, one)
        yield f"{one}_factored", lambda one=one: layer("kernel", False, structure=one, factored=True)
    yield "cudnn_tf32", lambda: cudnn(torch.float32, True)
    yield "cudnn_bf16", lambda: cudnn(torch.bfloat16, True)
    for one in ON_TENSOR_CORES:
        yield f"{one}_tf32", lambda one=one: layer("kernel", True, structure=one)
        yield f"{one}_bf16", lambda one=one: layer("kernel", True, lower=True, structure=one)
        yield f"{one}_recurrent_tf32", lambda one=one: alone(precision.TF32, one)
        yield f"{one}_recurrent_bf16", lambda one=one: alone(precision.BF16, one)
    if steps <= 128:
        yield "torch_loop", lambda: layer("reference", False)
        if not training and (kind, batch) == ("lstm", 64):  # each takes half a minute to compile
            loop = compiled_loop(kind, hidden)
            with_grad_off = torch.no_grad()(lambda: milliseconds(lambda: loop(x), budget))
            yield "torch_compile_loop", with_grad_off


def sweep(quick: bool) -> Iterator[tuple[str, int, int, int, bool]]:
    """Kind, hidden size, batch, steps, training: the target cases first."""
    first = [("lstm", hidden, 64, 1024, training) for hidden in CEILING for training in (False, True)]
    yield from first
    if quick:
        return
    for steps in (128, 1024):
        for kind in GATES:
            for hidden in PAIRS:
                for batch in (1, 8, 64, 256):
                    for training in (False, True):
                        case = (kind, hidden, batch, steps, training)
                        if case not in first and batch * steps * hidden <= 64 * 1024 * 4096:
                            yield case


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def known_rows(target: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run of the same commit on the same GPU has written."""
    if not target.exists():
        return []
    about, *rows = read(target)
    same = all(about.get(name) == result[name] for name in ("gpu", "torch", "commit"))
    return rows if same else []


def table(rows: list[dict[str, Any]]) -> str:
    """The tables of cuda_layers.md: the target cases."""
    by = {case_of(r): r["ms"] for r in rows}

    def shown(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else "not measured"

    def over(ms: dict[str, Any], dense: str, ours: str) -> list[str]:
        a, b = ms.get(ours), ms.get(dense)
        return [shown(a), shown(b / a if isinstance(a, float) and isinstance(b, float) else None)]

    lines: list[str] = []
    for training in (False, True):
        limits = ["ratio", "at most"], ["ratio", "wanted"], ["ratio", "wanted"]
        heads = ("kruify, dense W_ih", "recurrence alone", "W_ih factored, too")
        columns = [
            c for head, more in zip(heads, limits, strict=True) for c in (head, *(more[:1] if training else more))
        ]
        first = "layer, forward + backward" if training else "layer, forward"
        lines += ["", "| " + " | ".join((first, "cuDNN float32", *columns)) + " |", "|--" * (len(columns) + 2) + "|"]
        for hidden in CEILING:
            ms = by.get(("lstm", hidden, 64, 1024, training), {})
            for one in STRUCTURES:
                cells = [f"LSTM {hidden} ({spec(one, 'lstm', hidden)})", shown(ms.get("cudnn_float32"))]
                parts = ((one, CEILING), (f"{one}_recurrent", WANTED_ALONE), (f"{one}_factored", WANTED_FACTORED))
                for name, limit in parts:
                    cells += over(ms, "cudnn_float32", name) + ([] if training else [f"{limit[hidden]:g}"])
                lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| layer, on tensor cores | cuDNN TF32 | kruify TF32 | ratio | recurrence alone | ratio |"
        " cuDNN bf16 | kruify bf16 | ratio | recurrence alone | ratio |",
        "|--" * 11 + "|",
    ]
    for hidden in CEILING:
        for training in (False, True):
            ms = by.get(("lstm", hidden, 64, 1024, training), {})
            for one in ON_TENSOR_CORES:
                cells = [f"LSTM {hidden} ({spec(one, 'lstm', hidden)}), forward{' + backward' if training else ''}"]
                for name in ("tf32", "bf16"):
                    cells.append(shown(ms.get(f"cudnn_{name}")))
                    cells += over(ms, f"cudnn_{name}", f"{one}_{name}")
                    cells += over(ms, f"cudnn_{name}", f"{one}_recurrent_{name}")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def write(result: dict[str, Any], target: Path) -> None:
    """The table, and the file: on what it was measured, then one row per line."""
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in result.items() if name != "rows"}
    target.write_text("".join(json.dumps(row) + "\n" for row in (about, *result["rows"])))
    page = ROOT / "benchmarks" / "cuda_layers.md"
    begin, end, old = "<!-- timings -->", "<!-- end of timings -->", page.read_text()
    said = f"{result['gpu']}, torch {result['torch']}, commit {result['commit'][:12]}; ceilings: " + ", ".join(
        f"{name} {value:.0f}" for name, value in result["ceilings"].items()
    )
    page.write_text(f"{old.split(begin)[0]}{begin}\n{said}\n\n{table(result['rows'])}\n{end}{old.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the target cases alone")
    parser.add_argument("--seconds", type=float, default=540, help="stop after this long (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already has")
    parser.add_argument("--out", type=Path, help="the file")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing to measure")
    if not backend_info()["cuda"]:
        raise SystemExit("the library was built without CUDA: KRUIFY_CUDA=1 python setup.py build_ext --inplace")
    began, gpu = time.perf_counter(), torch.cuda.get_device_name()
    target = chosen.out or ROOT / "benchmarks" / "results" / f"cuda_layers-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.jsonl"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True)
    result: dict[str, Any] = {
        "gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "commit": head.stdout.strip() or "unknown", "ceilings": ceilings(), "rows": [],
    }  # fmt: skip
    if not chosen.fresh:
        result["rows"] = known_rows(target, result)
    done = {case_of(row) for row in result["rows"]}
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}), flush=True)
    budget = 0.5 if chosen.quick else 0.25
    for case in sweep(chosen.quick):
        if case in done:
            continue
        row: dict[str, Any] = dict(zip(CASE, case, strict=True))
        row |= {"ms": {}, **work(*case)}
        for name, measure in candidates(*case, budget):
            if time.perf_counter() - began > chosen.seconds:
                print("out of time: the rest is not measured", flush=True)
                write(result, target)
                return
            try:
                row["ms"][name] = measure()
            except (RuntimeError, KruifyError) as error:  # out of memory, no cuDNN kernel
                row["ms"][name] = f"failed: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
        ours_ms = row["ms"].get("kruify")
        if isinstance(ours_ms, float):
            row["tflop_per_s"] = (row["recurrent_gflop"] + row["input_gflop"]) / ours_ms
            row["gb_per_s"] = row["gb"] / ours_ms * 1e3
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(result, target)


if __name__ == "__main__":
    main()
