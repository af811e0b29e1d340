"""Builds the kernels ahead of time into kruify/_C.abi3.so. All other configuration is in pyproject.toml.

The library uses torch's stable ABI and no Python API, so one build serves every Python and every torch >= 2.10. It
needs a C++ compiler and the headers of the torch that kruify is installed beside; no torch is downloaded to build it.
Without either kruify installs all the same and runs on the torch reference. Environment:

    CXX                        the C++ compiler (default: c++, g++ or clang++, whichever is found first)
    KRUIFY_CUDA=1              build csrc/cuda, too, with nvcc; takes minutes for each architecture
    KRUIFY_CUDA_ARCHS          compute capabilities, for example 90 (default: 80 86 89 90 100 120 and PTX)
    KRUIFY_CXXFLAGS            flags added to every compile and link, for example -fsanitize=address
    KRUIFY_REQUIRE_KERNELS=1   fail where the kernels cannot be built
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
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
HOW_TO_GET_ONE = "`apt install g++`, `dnf install gcc-c++` or `xcode-select --install` brings one"


class BuildError(Exception):
    """The kernels cannot be built here."""


class BuildKernels(build_ext):
    """Compiles csrc/ with the system's compilers; a build that cannot be had is said loudly and skipped."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("kruify._C")).parent / "_C.abi3.so"
        if self.inplace:
            target = ROOT / "kruify" / "_C.abi3.so"
        try:
            build_library(target, Path(self.build_temp))
        except (BuildError, OSError) as error:
            if os.environ.get("KRUIFY_REQUIRE_KERNELS") or cuda_wanted():
                raise
            target.unlink(missing_ok=True)  # of an earlier build
            print(error, file=sys.stderr)
            text = f"WARNING: installed WITHOUT its compiled kernels and will be slow: {str(error).splitlines()[0]}"
            tell(text)
            warnings.warn(f"kruify: {text}", stacklevel=1)  # shown by pip from 26 on

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("kruify._C")).parent / "_C.abi3.so"
        return [str(target)] if target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def tell(text: str) -> None:
    """Says something to the person who installs: pip hides all that a build which succeeds writes."""
    print(f"kruify: {text}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\rkruify: {text:<60}\n")  # over pip's "Building wheel ..."
        except OSError:
            pass  # nobody is there


def build_library(target: Path, temporary: Path) -> None:
    compiler = (os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")).split()
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"no C++ compiler ({compiler[0]}) was found. {HOW_TO_GET_ONE}, then install kruify again")
    torch = torch_folder()
    extra = os.environ.get("KRUIFY_CXXFLAGS", "").split()
    flags = [*COMMON, *STABLE_ABI, f"-I{CSRC}", f"-isystem{torch / 'include'}", *extra]
    temporary.mkdir(parents=True, exist_ok=True)
    machine = platform.machine().lower()
    flags_of = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(machine, {}) | EVERYWHERE
    jobs = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name in X86 | ARM and source.name not in flags_of:
            continue
        output = temporary / f"{source.stem}.o"
        own = flags_of.get(source.name, [])
        jobs.append((output, [*compiler, *flags, *own, "-c", str(source), "-o", str(output)]))
    # torch's wheel also brings what the C++ library of an old system lacks; so linked, ours runs wherever torch does.
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/../torch/lib"]
    if cuda_wanted():
        nvcc, architectures = find_nvcc(), cuda_architectures()
        tell(f"KRUIFY_CUDA=1: compiling CUDA kernels for {', '.join(architectures)}; takes minutes for each")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            output = temporary / f"{source.stem}.cu.o"
            jobs.append((output, nvcc_command(nvcc, architectures, source, output, torch)))
        # The static runtime: the library then loads wherever torch does, with a GPU or without.
        link += [f"-L{cuda_libraries(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        if (torch / "lib" / "libtorch_cuda.so").exists():
            link += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    compile_all([job for job in jobs if stale(*job)])
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, "-shared", *extra, *(str(output) for output, _ in jobs), *link, "-o", str(target) + ".tmp"])
    os.replace(str(target) + ".tmp", target)  # a running process keeps the old file


def torch_folder() -> Path:
    """Where torch is, found without an import. pip builds out of sight of it, but with its environment's Python."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    places += [Path(folder) / "torch" for folder in folders]
    for place in places:
        if (place / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return place
    raise BuildError(
        "the kernels need the headers of torch >= 2.10, and none is installed here. `pip install torch`, then install"
        " kruify again (outside of pip, where a build does not see this environment: without build isolation)"
    )


def cuda_wanted() -> bool:
    return os.environ.get("KRUIFY_CUDA") == "1"


def cuda_architectures() -> list[str]:
    return os.environ.get("KRUIFY_CUDA_ARCHS", "").replace(",", " ").split() or list(ARCHITECTURES)


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if nvcc is None:
        raise BuildError("KRUIFY_CUDA=1, but nvcc was not found; put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_libraries(nvcc: str) -> Path:
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], check=False, capture_output=True, text=True)
    tops = [line.split("=", 1)[1].strip() for line in listing.stderr.splitlines() if "TOP=" in line]
    return Path(tops[0] if tops else Path(nvcc).resolve().parent.parent) / "lib64"


def nvcc_command(nvcc: str, architectures: list[str], source: Path, output: Path, torch: Path) -> list[str]:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = ["-std=c++20", "-O3", "--threads=0", "-DUSE_CUDA", *STABLE_ABI, "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler", "-fPIC", *codes, f"-I{CSRC}", f"-isystem={torch / 'include'}"]
    return [nvcc, *flags, "-c", str(source), "-o", str(output)]


def stale(output: Path, command: list[str]) -> bool:
    folder = CSRC.rglob if output.name.endswith(".cu.o") else CSRC.glob
    newest = max(path.stat().st_mtime for path in folder("*.[ch]*"))
    stamp = output.with_suffix(".command")
    built = output.exists() and output.stat().st_mtime > newest
    return not (built and stamp.exists() and stamp.read_text() == repr(command))


def compile_all(jobs: list[tuple[Path, list[str]]]) -> None:
    def compile_one(output: Path, command: list[str]) -> str:
        run(command)
        output.with_suffix(".command").write_text(repr(command))
        return output.stem

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = [pool.submit(compile_one, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(running), 1):
                tell(f"compiled {done} of {len(jobs)} files: {future.result()}")
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed\n{' '.join(command)}\n{done.stderr[-4000:]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def package_page() -> str:
    """The README for a package index, where links into the tree lead nowhere and its pictures are not shown."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https://)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https://)[^)]*\)", r"\1", text)


setup(
    long_description=package_page(),
    long_description_content_type="text/markdown",
    packages=["kruify.cli", *find_packages(include=["kruify", "kruify.*"])],
    ext_modules=[Extension("kruify._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
    # No Python API inside: one wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
