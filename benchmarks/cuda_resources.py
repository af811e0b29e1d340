"""Compiles the CUDA kernels and records what each needs: registers, spills, shared memory, seconds of compiling.

    python benchmarks/cuda_resources.py                 sm_90 only
    python benchmarks/cuda_resources.py --arch all      every architecture of setup.py, and PTX (`make cuda-all`)
    python benchmarks/cuda_resources.py --arch 80,100 --only "low_rank_*.cu"

Needs nvcc and torch's headers, no GPU. Goes on where it stopped, and compiles again what has changed. Writes
build/cuda-resources/resources.json and the first table of benchmarks/cuda_layers.md. The shared memory of a template is
what its launch asks for; see csrc/cuda/pair_plan.h.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "kruify" / "csrc"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CODES = {f"sm_{a}": f"arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES}
CODES["PTX"] = f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"
FIXED_SHAPES = ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
PRECISIONS = ("float32", "tf32", "bf16")  # in the order of kruify/ops/precision.py
# Bytes of shared memory that a block may have, multiprocessors of a usual chip, clusters.
CHIPS = {"sm_90 (H200)": (232448, 132, 1), "sm_80 (A100)": (166912, 108, 0), "sm_89 (RTX 4090)": (101376, 128, 0)}


def nvcc() -> str | None:
    """nvcc on PATH or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def command(compiler: str, source: Path, output: Path, code: str) -> list[str]:
    """The compiler call of setup.py for one architecture, with a report on every kernel."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    return [compiler, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-gencode={code}",
            f"-I{CSRC}", f"-isystem={headers}", "-c", str(source), "-o", str(output)]  # fmt: skip


def kernels(log: str) -> list[dict[str, object]]:
    """The kernels in ptxas' report: name, registers, bytes spilled and on the stack (local memory), shared memory."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if spill and used:
            found.append(
                {
                    "kernel": part.split("'", 1)[0],
                    "registers": int(used[1]),
                    "stack_bytes": int(spill[1]),
                    "spill_bytes": int(spill[2]) + int(spill[3]),
                    "static_shared_bytes": int(shared[1]) if shared else 0,
                }
            )
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Mangled to demangled names, shortened."""
    if shutil.which("c++filt") is None:
        return {n: n for n in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (re.sub(r"^void |kruify::cuda::|\(anonymous namespace\)::|\(.*$", "", n) for n in done.stdout.splitlines())
    return dict(zip(names, (s.replace("(int)", "") for s in short), strict=True))


def made_of(dependencies: Path, command: list[str]) -> str:
    """A hash of a compiler call and of the files that it read by its list of dependencies; empty without one."""
    if not dependencies.exists():
        return ""
    names = dependencies.read_text().replace("\\\n", " ").split()[1:]
    digest = hashlib.sha256(" ".join(command).replace(str(ROOT), "").encode())
    for source in (Path(name) for name in names if name.startswith(str(CSRC))):
        digest.update(source.read_bytes() if source.exists() else b"")
    return digest.hexdigest()


class Job:
    """One .cu file for one of CODES, and what the compiler said of it when it was last called."""

    def __init__(self, compiler: str, folder: Path, source: Path, architecture: str) -> None:
        self.source, self.architecture = source, architecture
        self.told, self.read, output = (folder / f"{source.stem}.{architecture}.{end}" for end in ("json", "d", "o"))
        self.asked = command(compiler, source, output, CODES[architecture])
        self.asked += ["-MD", "-MF", str(self.read)]

    def known(self) -> dict[str, Any] | None:
        """Kernels and CPU seconds; None where the sources have changed since."""
        found: dict[str, Any] = json.loads(self.told.read_text()) if self.told.exists() else {}
        return found if found and found["made_of"] == made_of(self.read, self.asked) else None

    def compile(self) -> None:
        before = os.times()
        done = subprocess.run(self.asked, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.source.name} for {self.architecture}:\n{done.stderr[-4000:]}")
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found = kernels(done.stdout + done.stderr)
        names = readable([str(k["kernel"]) for k in found])
        for k in found:
            k["kernel"] = names[str(k["kernel"])]
        made = {"made_of": made_of(self.read, self.asked), "cpu_seconds": cpu, "kernels": found}
        self.told.write_text(json.dumps(made))
        print(f"{self.source.name} for {self.architecture}: {len(found)} kernels, {cpu:.0f} s of CPU", flush=True)


def compile_all(compiler: str, folder: Path, architectures: list[str], only: str) -> dict[str, dict[str, Any]]:
    """Compiles the .cu files that match `only` for these architectures, one by one; what is known of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {}
    for name in CODES:
        jobs = [Job(compiler, folder, source, name) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        for job in jobs:
            if name in architectures and job.source.match(only) and not job.known():
                job.compile()
        known = {job.source.stem: found for job in jobs if (found := job.known())}
        if known:
            seconds = round(sum(found["cpu_seconds"] for found in known.values()))
            missing = ", ".join(job.source.stem for job in jobs if job.source.stem not in known)
            files = f"all but {missing}" if missing else "all"
            all_kernels = [kernel for found in known.values() for kernel in found["kernels"]]
            result[name] = {"files": files, "cpu_seconds": seconds, "kernels": all_kernels}
    return result


def planner() -> ctypes.CDLL:
    """The code that plans launches."""
    source = ROOT / "tests" / "cuda" / "shim" / "plan.cpp"
    library = ROOT / "build" / "cuda-resources" / "plan.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler = next(c for c in ("g++", "c++", "clang++") if shutil.which(c))
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def shared_memory(plan: ctypes.CDLL) -> list[dict[str, object]]:
    """What the launches of the templates ask for at a batch of 64, computed by the code that launches them."""
    choose, rows = plan.shim_plan, []
    for chip, (size, processors, clusters) in CHIPS.items():
        for kind in GATES:
            for shape in FIXED_SHAPES:
                for rank in (1, 2, 4):
                    for backward, wanted in itertools.product((0, 1), range(3)):
                        found = (ctypes.c_int * 5)()
                        choose(GATES[kind], *shape, rank, 64, backward, wanted, processors, size, clusters, found)
                        fits = found[0] > 0
                        rows.append({
                            "chip": chip, "kind": kind, "rank": rank,
                            "stages": f"{shape[0]}x{shape[0]},{shape[1]}x{shape[1]}",
                            "pass": "backward" if backward else "forward", "asked": PRECISIONS[wanted],
                            "kernel": "two-stage template" if fits else "general",
                            "products": PRECISIONS[found[4]],
                            "blocks_per_row": found[0] if fits else 1, "threads": found[1],
                            "tile_columns": found[2], "shared_bytes": found[3],
                        })  # fmt: skip
    return rows


# LSTM, gates stacked: hidden size, rank, (products, rows, rows) of a term of two square stages, share of a residual.
LOW_RANK = (
    (512, 32, None, 0.0), (1024, 64, None, 0.0), (2048, 128, None, 0.0), (1024, 32, (1, 32, 32), 0.0),
    (512, 24, None, 0.02), (1024, 40, None, 0.01),
)  # fmt: skip


def expected(plan: ctypes.CDLL, case: tuple[Any, ...], batch: int, wanted: int) -> list[int]:
    """What tests/cuda/shim/plan.cpp tells of the low-rank recurrence forward of one of LOW_RANK on an H200."""
    hidden, rank, pair, sparse = case
    sizes = (hidden, 4, 1, rank, *(pair or (0, 0, 0)), int(sparse * 4 * hidden * hidden / 8), 8)
    found = (ctypes.c_int64 * 9)()
    size, processors, clusters = CHIPS["sm_90 (H200)"]
    plan.shim_low_rank((ctypes.c_int * 9)(*sizes), batch, 0, wanted, processors, size, clusters, found)
    return list(found)


def named(case: tuple[Any, ...]) -> str:
    hidden, rank, pair, sparse = case
    what = f"stacked:{rank}*({4 * hidden}x1,1x{hidden})"
    what += f" and {pair[0]}*({pair[1]}x{pair[1]},{pair[2]}x{pair[2]})" if pair else ""
    return what + (f"+sparse:{sparse:.0%}" if sparse else "")


def low_rank(plan: ctypes.CDLL) -> list[str]:
    """The table of what the low-rank recurrence is expected to take, by the model that chooses its plans."""
    heads = ["W_hh", "products", "blocks per cluster", "rows", "shared memory per block"]
    heads += ["clocks of a step", "of them assumed", "with the dense weight", "ratio"]
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for case in LOW_RANK:
        for wanted, name in enumerate(PRECISIONS):
            cluster, rows, room, clocks, assumed, dense = expected(plan, case, 64, wanted)[:6]
            plan_of = [cluster, rows, f"{room / 1024:.0f} KB"] if cluster else ["step by step in a CUDA graph", "", ""]
            told = map(str, [*plan_of, clocks, assumed if cluster else "", dense, f"{dense / clocks:.1f}"])
            lines.append(f"| {named(case)} | {name} | {' | '.join(told)} |")
    return lines


def eight_bits(plan: ctypes.CDLL) -> list[str]:
    """The table of what eight-bit weights would save: three quarters of what a launch reads of them. A call is the
    product with W_ih, two launches that pack the thin matrices, and the recurrence."""
    heads = ["W_hh, batch 1", "clocks to read it", "1 step", "1 step in a CUDA graph", "16 steps", "1024 steps"]
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for case in LOW_RANK[:2]:
        _, _, _, clocks, _, _, reading, launch, kept = expected(plan, case, 1, 0)
        calls = [
            4 * one + reading + steps * clocks for one, steps in ((launch, 1), (kept, 1), (launch, 16), (launch, 1024))
        ]
        lines.append(f"| {named(case)} | {reading} | {' | '.join(f'{0.75 * reading / c:.1%}' for c in calls)} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """The table of cuda_layers.md."""
    compiled = result["architectures"]
    assert isinstance(compiled, dict)
    lines = [
        "| architecture | files | kernels | with spills | with a stack | most registers | CPU seconds to compile |"
    ]
    lines.append("|--|--|--|--|--|--|--|")
    for name, one in compiled.items():
        ks = one["kernels"]
        if name == "PTX":
            lines.append(f"| {name} | {one['files']} | | | | | {one['cpu_seconds']} |")
        else:
            spilling, stacked = (sum(k[f"{what}_bytes"] > 0 for k in ks) for what in ("spill", "stack"))
            most = max(k["registers"] for k in ks)
            counts = " | ".join(map(str, (len(ks), spilling, stacked, most, one["cpu_seconds"])))
            lines.append(f"| {name} | {one['files']} | {counts} |")
    lines += ["", "Two-stage templates on sm_90, batch 64, one term; products in float32 / TF32 / bf16:", ""]
    lines.append("| kind | stages | pass | blocks per row | threads | shared memory per block | registers | spilled |")
    lines.append("|--|--|--|--|--|--|--|--|")
    used = {k["kernel"]: k for k in compiled["sm_90"]["kernels"]} if "sm_90" in compiled else {}
    shared = result["shared_memory"]
    assert isinstance(shared, list)
    for row in shared:
        if row["chip"] != "sm_90 (H200)" or row["rank"] != 1 or row["asked"] != "float32":
            continue
        columns: list[tuple[str, ...]] = []
        for asked in PRECISIONS:
            one = next(r for r in shared if r == r | {k: row[k] for k in CASE} | {"asked": asked})
            kernel = used.get(kernel_name(one), {"registers": "?", "spill_bytes": "?"})
            kib = f"{one['shared_bytes'] / 1024:.0f}"
            columns.append(
                (
                    str(one["blocks_per_row"]),
                    str(one["threads"]),
                    kib,
                    str(kernel["registers"]),
                    str(kernel["spill_bytes"]),
                )
            )
        blocks, threads, size, registers, spilled = (" / ".join(column) for column in zip(*columns, strict=True))
        what = f"| {row['kind']} | {row['stages']} | {row['pass']} "
        lines.append(f"{what}| {blocks} | {threads} | {size} KB | {registers} | {spilled} |")
    told = "The low-rank recurrence forward on an H200, batch 64, as the model in csrc/cuda/low_rank_plan.h expects it;"
    lines += ["", f"{told} nobody has measured it:", "", *result["low_rank"]]
    told = "What of a call eight-bit weights would save, by the same model; they are not built:"
    return "\n".join([*lines, "", told, "", *result["eight_bits"]])


CASE = ("chip", "kind", "rank", "stages", "pass")  # of a row of shared_memory


def kernel_name(row: dict[str, object]) -> str:
    """The template that a row of shared_memory runs, as the demangler writes it."""
    gates, sizes = GATES[str(row["kind"])], re.findall(r"(\d+)x", str(row["stages"]))
    numbers = {"tf32": "Tf32", "bf16": "Bf16"}.get(str(row["products"]), f"Exact<{row['tile_columns']}>")
    return f"pair_{row['pass']}_kernel<{gates}, {numbers}, Square<{sizes[0]}, {sizes[1]}> >"


def write_table(text: str) -> None:
    """Puts the table between its marks in cuda_layers.md."""
    page = ROOT / "benchmarks" / "cuda_layers.md"
    begin, end = "<!-- resources -->", "<!-- end of resources -->"
    old = page.read_text()
    page.write_text(f"{old.split(begin)[0]}{begin}\n{text}\n{end}{old.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="numbers such as 90 or 80,100, or all")
    parser.add_argument("--only", default="*.cu", metavar="GLOB", help="these files alone, for example low_rank_*.cu")
    chosen = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("nvcc was not found; put it on PATH or set CUDA_HOME")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]
    folder = ROOT / "build" / "cuda-resources"
    wanted = list(CODES) if chosen.arch == "all" else [f"sm_{a}" for a in chosen.arch.split(",")]
    found = compile_all(compiler, folder, wanted, chosen.only)
    plan = planner()
    result = {
        "nvcc": version,
        "architectures": found,
        "shared_memory": shared_memory(plan),
        "low_rank": low_rank(plan),
        "eight_bits": eight_bits(plan),
    }
    (folder / "resources.json").write_text(json.dumps(result) + "\n")
    write_table(table(result))


if __name__ == "__main__":
    main()
