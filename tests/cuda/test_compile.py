"""All CUDA code goes through nvcc, spills no registers, and registers its operators. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kruify" / "csrc"
FEW_SHAPES = Path(__file__).parent / "few_shapes.h"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

MARK = b"\nsaid by ptxas:\n"
REGISTERS = """
import torch
from kruify import ops
names = "merge merge_backward kron_matmul kron_matmul_forward kron_matmul_backward".split()
names += "recurrence recurrence_forward recurrence_backward".split()
has = lambda n: torch._C._dispatch_has_kernel_for_dispatch_key("kruify::" + n, "CUDA")
assert not any(map(has, names))
torch.ops.load_library({library!r})
assert all(map(has, names)), [n for n in names if not has(n)]
"""


@pytest.fixture
def resources():  # type: ignore[no-untyped-def]
    """benchmarks/cuda_resources.py as a module."""
    path = ROOT / "benchmarks" / "cuda_resources.py"
    spec = importlib.util.spec_from_file_location("cuda_resources", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiled(cached, resources):  # type: ignore[no-untyped-def]
    """A function: .cu file -> its object file, with what ptxas said of its kernels.

    Of the fixed shapes the smallest and the largest: the others are the same code between them, and half the time. The
    host's part is not optimised.
    """
    nvcc = resources.nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not here: nothing to compile CUDA code with")

    def compile(source: Path) -> Path:
        command = resources.command(nvcc, source, Path("out"), "arch=compute_90,code=sm_90")
        command += ["-include", str(FEW_SHAPES), "-Xcompiler", "-O0"]

        def build(target: Path) -> None:
            command[command.index("-o") + 1] = f"{target}.o"
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            # What ptxas says stands behind the object's end, where no linker looks.
            target.write_bytes(Path(f"{target}.o").read_bytes() + MARK + (done.stdout + done.stderr).encode())
            os.unlink(f"{target}.o")

        headers = [FEW_SHAPES, *sorted(s for s in [*(CSRC / "cuda").glob("*"), *CSRC.glob("*.h")] if s.suffix != ".cu")]
        return cached(f"{source.stem}.o", [source, *headers], [*command, torch.__version__], build)

    return compile


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_it_compiles_without_spills(compiled, resources, source) -> None:  # type: ignore[no-untyped-def]
    found = resources.kernels(compiled(source).read_bytes().split(MARK)[1].decode())
    assert found, f"ptxas told of no kernel in {source.name}"
    assert [k for k in found if k["spill_bytes"]] == []
    # Arrays in local memory show as a stack; the general kernel's are indexed by what only the launch knows.
    assert [k for k in found if k["stack_bytes"] and re.search("pair_|low_rank_", str(k["kernel"]))] == []


def test_the_library_registers_its_operators(compiled, resources, tmp_path) -> None:  # type: ignore[no-untyped-def]
    objects, nvcc = [str(compiled(source)) for source in SOURCES], resources.nvcc()
    library = tmp_path / "registers.so"
    torch_root = Path(torch.__file__).parent / "lib"
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], check=False, capture_output=True, text=True)
    top = next(
        (Path(line.split("=", 1)[1]) for line in listing.stderr.splitlines() if "TOP=" in line), Path("/usr/local/cuda")
    )
    linked = subprocess.run(
        ["g++", "-shared", *objects, f"-L{torch_root}", "-ltorch_cpu", "-lc10", f"-L{top / 'lib64'}", "-lcudart_static",
         "-lrt", "-ldl", "-lpthread", "-o", str(library)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert linked.returncode == 0, linked.stderr[-4000:]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTERS.format(library=str(library))],
        check=True, cwd=ROOT, env={**os.environ, "KRUIFY_NO_KERNELS": "1"},
    )  # fmt: skip
