"""What one step of the two-stage recurrence is: instructions and barriers in the kernel's loop over time, from its PTX.

    python benchmarks/cuda_steps.py [COMMIT ...]      the tree as it is, and commits to hold it against

Needs nvcc, no GPU. Prints the table of benchmarks/cuda_layers.md. Counts are static: an inner loop counts once.
What matters most stands before the arrival at the cluster's barrier: it waits for every store to global memory since
the last barrier of the block.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cuda_resources

KERNELS = {
    "LSTM forward": ("pair_forward", "pair_forward_kernel<4, Exact<4>, Square<64, 64> >"),
    "LSTM backward": ("pair_backward", "pair_backward_kernel<4, Exact<4>, Square<64, 64> >"),
}
COUNTED = {
    "instructions": r"",
    "barriers of the block": r"bar(rier)?\.sync",
    "arrivals at the cluster's barrier": r"barrier\.cluster\.arrive",
    "loads from global memory": r"ld\.(global|param\.global)",
    "stores to global memory": r"st\.global",
    "loads from shared memory": r"ld\.shared|ld\.v4|ld\.f32|ld\.b32",
    "multiply-adds": r"fma\.rn",
    "remainders": r"rem\.",
}


def ptx(root: Path, source: str) -> str:
    """The PTX of a file of csrc/cuda under `root`, for compute capability 9.0."""
    compiler = cuda_resources.nvcc()
    if compiler is None:
        raise SystemExit("nvcc was not found; put it on PATH or set CUDA_HOME")
    csrc = root / "kruify" / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.ptx"
        command = [compiler, "-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", f"-I{csrc}"]
        command += [
            "-include",
            str(cuda_resources.ROOT / "tests" / "cuda" / "few_shapes.h"),
            "-arch=compute_90",
            "-ptx",
        ]
        subprocess.run([*command, str(csrc / "cuda" / f"{source}.cu"), "-o", str(target)], check=True)
        return target.read_text()


def bodies(text: str) -> dict[str, list[str]]:
    """The kernels of a PTX file: lines in order."""
    parts = re.split(r"\.entry ", text)[1:]
    return {part.split("(", 1)[0].strip(): part[part.index("{") :].splitlines() for part in parts}


def step(lines: list[str]) -> list[str]:
    """The loop over time: of the loops that hold a barrier the widest."""
    labels = {line.split(":")[0].strip(): k for k, line in enumerate(lines) if re.match(r"\$L\w+:", line.strip())}
    loops = []
    for k, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if jump and labels.get(jump[1], k) < k:
            loops.append(lines[labels[jump[1]] : k + 1])
    held = [loop for loop in loops if any(re.search(COUNTED["barriers of the block"], line) for line in loop)]
    return [line.strip() for line in max(held, key=len) if ";" in line and not line.strip().startswith((".", "//"))]


def counts(body: list[str]) -> dict[str, int]:
    """What COUNTED names, and the stores that each arrival waits for."""
    found = {name: sum(bool(re.search(pattern, line)) for line in body) for name, pattern in COUNTED.items()}
    waits = since = 0
    for line in body:
        if re.search(COUNTED["stores to global memory"], line):
            since += 1
        elif "barrier.cluster.arrive" in line and "relaxed" not in line:
            waits, since = waits + since, 0
        elif re.search(COUNTED["barriers of the block"], line):
            since = 0
    return {**found, "stores that an arrival waits for": waits}


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
        for title, (source, kernel) in KERNELS.items():
            columns = {}
            for name, root in roots.items():
                found = bodies(ptx(root, source))
                readable = cuda_resources.readable(list(found))
                columns[name] = counts(step(next(found[n] for n in found if readable[n] == kernel)))
            print(f"| {title}, `{kernel}`, a step | {' | '.join(columns)} |\n|--{'|--' * len(columns)}|")
            for what in next(iter(columns.values())):
                print(f"| {what} | {' | '.join(str(c[what]) for c in columns.values())} |")
            print()


if __name__ == "__main__":
    main()
