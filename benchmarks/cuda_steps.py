"""What one step of a recurrence is: instructions and barriers in the kernel's loop over time, from its SASS.

    PATH=...:$PATH python benchmarks/cuda_steps.py [COMMIT ...]      the tree as it is, and commits to hold it against

Needs nvcc and nvdisasm (`pip install nvidia-cuda-nvdisasm`), no GPU. Prints the table of benchmarks/cuda_layers.md.
Counts are static: an inner loop counts once. A fence (MEMBAR) stands before an arrival at the cluster's barrier that
releases what the block has written, and waits for all its stores to global memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cuda_resources

KERNELS = {
    "LSTM 4096 forward, float32": ("pair_forward", "pair_forward_kernel<4, Exact<4>, Square<64, 64> >"),
    "LSTM 4096 backward, float32": ("pair_backward", "pair_backward_kernel<4, Exact<4>, Square<64, 64> >"),
    "LSTM of low rank, forward, float32": ("low_rank_forward", "low_rank_forward_kernel<4, Exact<4>, false>"),
    "LSTM of low rank, backward, float32": ("low_rank_backward", "low_rank_backward_kernel<4, Exact<4>, false>"),
    "the same and what stands beside, forward": ("beside_forward", "low_rank_forward_kernel<4, Exact<4>, true>"),
    "the same and what stands beside, backward": ("beside_backward", "low_rank_backward_kernel<4, Exact<4>, true>"),
}
BARRIER = r"^BAR\.SYNC"
COUNTED = {
    "instructions": r"",
    "barriers of the block": BARRIER,
    "arrivals at the cluster's barrier": r"^UCGABAR_ARV",
    "fences": r"^MEMBAR",
    "loads from global memory": r"^LDG",
    "stores to global memory": r"^STG",
    "loads from shared memory": r"^LDS",
    "stores to shared memory": r"^STS",
    "loads and stores through generic addresses": r"^(LD|ST)\.E",
    "loads and stores in local memory": r"^(LDL|STL)",
    "multiply-adds": r"^FFMA",
}


def sass(root: Path, source: str) -> str:
    """The SASS of a file of csrc/cuda under `root`, for compute capability 9.0; empty where it has no such file."""
    compiler, csrc = cuda_resources.nvcc(), root / "kruify" / "csrc"
    if compiler is None or shutil.which("nvdisasm") is None:
        raise SystemExit("nvcc or nvdisasm was not found: put them on PATH (pip install nvidia-cuda-nvdisasm)")
    if not (csrc / "cuda" / f"{source}.cu").exists():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.cubin"
        few = cuda_resources.ROOT / "tests" / "cuda" / "few_shapes.h"
        command = [compiler, "-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", f"-I{csrc}"]
        command += ["-include", str(few), "-arch=sm_90", "-cubin"]
        subprocess.run([*command, str(csrc / "cuda" / f"{source}.cu"), "-o", str(target)], check=True)
        done = subprocess.run(["nvdisasm", "-c", str(target)], check=True, capture_output=True, text=True)
        return done.stdout


def bodies(text: str) -> dict[str, list[str]]:
    """The kernels of a listing: labels and instructions, without their predicates, in order."""
    found = {}
    for part in re.split(r"\n\.text\.", text)[1:]:
        lines = []
        for line in part.splitlines():
            label = re.match(r"(\.L_x_\d+):", line)
            instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(.*);", line)
            if label or instruction:
                lines.append(label[0] if label else instruction[1].strip())  # type: ignore[index]
        found[part.split(":", 1)[0]] = lines
    return found


def step(lines: list[str]) -> list[str]:
    """The loop over time: of the loops that hold a barrier the widest."""
    labels = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for k, line in enumerate(lines):
        jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], k) < k:
            loops.append(lines[labels[jump[1]] : k + 1])
    held = [loop for loop in loops if any(re.search(BARRIER, line) for line in loop)]
    return [line for line in max(held, key=len) if not line.endswith(":")]


def counts(body: list[str]) -> dict[str, int]:
    """What COUNTED names."""
    return {name: sum(bool(re.search(pattern, line)) for line in body) for name, pattern in COUNTED.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*")
    commits = parser.parse_args().commits
    with tempfile.TemporaryDirectory() as folder:
        roots = {}
        for commit in commits:
            roots[commit] = Path(folder) / commit
            packed = subprocess.run(
                ["git", "archive", commit, "kruify/csrc"], check=True, capture_output=True, cwd=cuda_resources.ROOT
            ).stdout
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(roots[commit], filter="data")
        roots["now"] = cuda_resources.ROOT
        sources = {source for source, _ in KERNELS.values()}
        listings = {(name, source): sass(root, source) for name, root in roots.items() for source in sources}
        for title, (source, kernel) in KERNELS.items():
            columns = {}
            for name in roots:
                found = bodies(listings[name, source])
                readable = cuda_resources.readable(list(found))
                if mangled := next((n for n in found if readable[n] == kernel), None):
                    columns[name] = counts(step(found[mangled]))
            print(f"| {title}, a step | {' | '.join(columns)} |\n|--{'|--' * len(columns)}|")
            for what in next(iter(columns.values())):
                print(f"| {what} | {' | '.join(str(c[what]) for c in columns.values())} |")
            print()


if __name__ == "__main__":
    main()
