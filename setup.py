"""Builds the kernels ahead of time into kruify/_C.abi3.so. All other configuration is in pyproject.toml.

The library uses torch's stable ABI and no Python API, so one build serves every Python and every torch >= 2.10.
Without a C++ compiler kruify installs all the same and runs on the torch reference. Environment:

    CXX                  the C++ compiler (default: c++, g++ or clang++, whichever is found first)
    KRUIFY_CUDA=0|1      never / always build csrc/cuda with nvcc (default: where torch has CUDA and nvcc is found)
    KRUIFY_CUDA_ARCHS    compute capabilities to compile for, for example 90 (default: 80 86 89 90 100 120 and PTX)
    KRUIFY_CXXFLAGS      flags added to every compile and link, for example -fsanitize=address
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "kruify" / "csrc"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
COMMON += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# One translation unit of kernels per instruction set; the machine picks at run time. Those of eight-bit integers round
# alike everywhere: no fused multiply-adds.
EXACT = "-ffp-contract=off"
X86 = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bw",
        "-mfma",
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",
    ],  # gcc 12 warns of its own headers
    "int8_avx2.cpp": ["-mavx2", EXACT],
    "int8_avxvnni.cpp": ["-mavx2", "-mavxvnni", EXACT],
    "int8_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vnni", "-Wno-maybe-uninitialized", EXACT],
}
ARM = {"int8_dotproduct.cpp": ["-march=armv8.2-a+dotprod", EXACT]}
EVERYWHERE = {"isa_portable.cpp": [], "int8_portable.cpp": [EXACT]}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class BuildKernels(build_ext):
    """Compiles csrc/ with the system's compilers; a build that cannot be had is said loudly and skipped."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("kruify._C")).parent / "_C.abi3.so"
        if self.inplace:
            target = ROOT / "kruify" / "_C.abi3.so"
        try:
            build_library(target, Path(self.build_temp))
        except (BuildError, OSError) as error:
            if os.environ.get("KRUIFY_REQUIRE_KERNELS"):
                raise
            banner = "*" * 100
            print(
                f"{banner}\nkruify installs WITHOUT compiled kernels and will be slow: {error}\n{banner}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("kruify._C")).parent / "_C.abi3.so"
        return [str(target)] if target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildError(Exception):
    """The kernels cannot be built here."""


def build_library(target: Path, temporary: Path) -> None:
    import torch

    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise BuildError("no C++ compiler was found")
    extra = os.environ.get("KRUIFY_CXXFLAGS", "").split()
    torch_root = Path(torch.__file__).parent
    flags = [*COMMON, *STABLE_ABI, f"-I{CSRC}", f"-isystem{torch_root / 'include'}", *extra]
    temporary.mkdir(parents=True, exist_ok=True)
    machine = platform.machine().lower()
    flags_of = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(machine, {}) | EVERYWHERE
    jobs = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name in X86 | ARM and source.name not in flags_of:
            continue
        output = temporary / f"{source.stem}.o"
        own = flags_of.get(source.name, [])
        jobs.append((output, [*compiler.split(), *flags, *own, "-c", str(source), "-o", str(output)]))
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    nvcc = find_nvcc(torch.version.cuda)
    if nvcc:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            output = temporary / f"{source.stem}.cu.o"
            jobs.append((output, nvcc_command(nvcc, source, output, torch_root)))
        if any(o.name.endswith(".cu.o") for o, _ in jobs):
            # The static runtime: the library then loads wherever torch does, with a GPU or without.
            link += [f"-L{cuda_libraries(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            if (torch_root / "lib" / "libtorch_cuda.so").exists():
                link += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: compile_if_stale(*job), jobs))
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler.split(), "-shared", *extra, *(str(o) for o, _ in jobs), *link, "-o", str(target) + ".tmp"])
    os.replace(str(target) + ".tmp", target)  # a running process keeps the old file


def find_nvcc(torch_cuda: str | None) -> str | None:
    wish = os.environ.get("KRUIFY_CUDA")
    if wish == "0" or (wish != "1" and torch_cuda is None):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if nvcc is None and wish == "1":
        raise BuildError("KRUIFY_CUDA=1, but nvcc was not found; put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_libraries(nvcc: str) -> Path:
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], check=False, capture_output=True, text=True)
    tops = [line.split("=", 1)[1].strip() for line in listing.stderr.splitlines() if "TOP=" in line]
    return Path(tops[0] if tops else Path(nvcc).resolve().parent.parent) / "lib64"


def nvcc_command(nvcc: str, source: Path, output: Path, torch_root: Path) -> list[str]:
    wish = os.environ.get("KRUIFY_CUDA_ARCHS", "").replace(",", " ").split() or list(ARCHITECTURES)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wish]
    codes.append(f"-gencode=arch=compute_{wish[-1]},code=compute_{wish[-1]}")
    flags = ["-std=c++20", "-O3", "--threads=0", "-DUSE_CUDA", *STABLE_ABI, "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler", "-fPIC", *codes, f"-I{CSRC}", f"-isystem={torch_root / 'include'}"]
    return [nvcc, *flags, "-c", str(source), "-o", str(output)]


def compile_if_stale(output: Path, command: list[str]) -> None:
    newest = max(p.stat().st_mtime for p in [*CSRC.rglob("*"), Path(__file__)])
    stamp = output.with_suffix(".command")
    if output.exists() and output.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == repr(command):
        return
    run(command)
    stamp.write_text(repr(command))


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


setup(
    packages=["kruify.cli", *find_packages(include=["kruify", "kruify.*"])],
    ext_modules=[Extension("kruify._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
    # No Python API inside: one wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
