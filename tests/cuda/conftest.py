"""The CUDA kernels on the CPU (shim/), built once per content of the sources, and matrices for them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kruify.ops.layout import Layout, TermLayout
from kruify.ops.recurrence import _layer_backward
from kruify.ops.reference import MODRELU

sys.path.insert(0, str(Path(__file__).parent))  # cases, shared by the tests here

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kruify" / "csrc"


def cached(name: str, sources: Sequence[Path], command: Sequence[str], build: Callable[[Path], None]) -> Path:
    """build/<hash of sources and command>-name, made by `build` where it is missing."""
    digest = hashlib.sha256(repr(list(command)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = ROOT / "build" / "cuda-tests" / f"{digest.hexdigest()[:16]}-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:  # of several test processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_name(f"{target.name}.{os.getpid()}")
            build(temporary)
            os.replace(temporary, target)
    return target


@dataclass
class Matrix:
    """What the operators take, in their order."""

    stages: list[Tensor]
    diagonal: Tensor | None
    residual: Tensor | None
    index: Tensor | None
    bias: Tensor | None
    layout: Layout

    def arguments(self) -> tuple[object, ...]:
        return self.stages, self.diagonal, self.residual, self.index, self.bias, self.layout.encode()

    def of_kind(self, kind: str) -> Matrix:
        """With a bias as the kind has it; modReLU's stays below 0, above it there is a leap at z = 0."""
        if kind not in MODRELU or self.bias is None:
            return self
        return replace(self, bias=-self.bias[: len(self.bias) // (2 if kind == "rnn_modrelu_complex" else 1)].abs())

    def to(self, dtype: torch.dtype) -> Matrix:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        return Matrix(
            [s.to(dtype) for s in self.stages],
            cast(self.diagonal),
            cast(self.residual),
            self.index,
            cast(self.bias),
            self.layout,
        )


class Launch(NamedTuple):
    kernel: str  # the types of its parameters, for example "Square<16, 16>, PairPlan, PairForward"
    blocks: int
    threads: int
    cluster: int
    bytes: int  # of shared memory


class Gpu:
    """The GPU that shim/runtime.cpp plays: `torch.ops.kruify.*` on CPU tensors run as they would on CUDA."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("shim_launches", "shim_race"):
            getattr(library, name).restype = ctypes.c_char_p
        for name in ("shim_products", "shim_races"):
            getattr(library, name).restype = ctypes.c_int64

    def chip(self, processors: int = 132, shared_memory: int = 232448, major: int = 9, order: int = 0) -> None:
        """Another one from here on, an H200 unless told otherwise; `order` of its threads: ascending, descending,
        shuffled."""
        self.library.shim_chip(processors, shared_memory, major, order)

    def launches(self, *of: str) -> list[Launch]:
        """Since the last call; of kernels that take one of these types."""
        found = []
        for line in self.library.shim_launches().decode().splitlines():
            *numbers, kernel = line.split(" ", 4)
            types = kernel.split("P = {")[1].split("}")[0].replace("kruify::cuda::", "")
            if not of or any(t in types for t in of):
                found.append(Launch(types, *map(int, numbers)))
        return found

    def tensor_products(self) -> int:
        """Warps' products on tensor cores since the last call."""
        return int(self.library.shim_products())

    def fits(self, gates: int, rank: int, rows1: int, rows2: int, training: bool, precision: int = 0) -> bool:
        """The operator `template_fits` on this chip."""
        question = (gates, rank, rows1, rows2, training, precision, self.library.shim_device())
        return bool(getattr(torch.ops, NAMESPACE).template_fits(*question))

    def pays(
        self, gates: int, hidden: int, sets: int, rank: int, batch: int, training: bool, precision: int = 0,
        beside: tuple[int, ...] = (0, 0, 0, 0, 0), kept: bool = False,
    ) -> bool:  # fmt: skip
        """The operator `low_rank_pays` on this chip."""
        sizes = (hidden, gates, sets, rank, *beside)
        question = (sizes, batch, training, kept, precision, self.library.shim_device())
        return bool(getattr(torch.ops, NAMESPACE).low_rank_pays(*question))

    def one_launch(self, gates: int, hidden: int, sets: int, rank: int, batch: int) -> bool:
        """The operator `low_rank_fits` on this chip."""
        sizes = (hidden, gates, sets, rank, 0, 0, 0, 0, 0)
        return bool(getattr(torch.ops, NAMESPACE).low_rank_fits(sizes, batch, 0, self.library.shim_device()))

    def plan(
        self, gates: int, rows1: int, rows2: int, rank: int, batch: int, backward: bool, precision: int = 0,
        shared_memory: int = 232448, major: int = 9,
    ) -> tuple[int, ...]:  # fmt: skip
        """A launch's cluster (0: none fits), threads, columns of a tile, bytes of shared memory and precision."""
        found = (ctypes.c_int * 5)()
        sizes = (gates, rows1, rows2, rank, batch, int(backward), precision, 132, shared_memory, int(major >= 9))
        self.library.shim_plan(*sizes, found)
        return tuple(found)

    def races(self) -> tuple[int, str]:
        """Clashes of threads since the last call, and one of them; with `watch`."""
        return self.library.shim_races(), self.library.shim_race().decode()

    def barriers(self) -> int:
        """The most barriers that a thread has met since the last call."""
        return int(self.library.shim_barriers())


NAMESPACE = "kruify_cuda_shim"
SHIM = Path(__file__).parent / "shim"
QUESTIONS = ("template_fits", "low_rank_fits", "low_rank_pays")  # of the layers' rule
OPERATORS = (
    *("merge", "merge_backward", "kron_matmul_forward", "kron_matmul_backward"),
    *("recurrence_forward", "recurrence_backward"),
)


def shim_command(compiler: str) -> list[str]:
    """Compiles one file of the kernels as C++."""
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-DUSE_CUDA"]
    flags += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DKRUIFY_CUDA_LIBRARY={NAMESPACE}",
        "-DKRUIFY_CUDA_KEY=CPU",
    ]
    return [compiler, *flags, f"-I{SHIM}", f"-I{CSRC}", f"-isystem{Path(torch.__file__).parent / 'include'}"]


@pytest.fixture(scope="session")
def shim() -> Gpu:
    """Every file of csrc/cuda as C++, with the smallest and the largest of the fixed shapes, each compiled once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA kernels for the CPU with")
    command, few = shim_command(compiler), Path(__file__).parent / "few_shapes.h"
    headers = sorted([few, *SHIM.glob("*.h"), *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.*h")])

    def run(*arguments: str) -> None:
        done = subprocess.run(arguments, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compiled(source: Path) -> Path:
        own = ["-fsanitize=thread", "-include", str(few), "-x", "c++"] if source.suffix == ".cu" else []
        whole = [*command, *own, "-c", str(source), "-o"]
        return cached(f"{source.name}.o", [source, *headers], whole, lambda target: run(*whole, str(target)))

    # The longest first. The shim's own objects are linked last: what headers define inline is taken watched.
    kernels = sorted((CSRC / "cuda").glob("*.cu"), key=lambda s: ("operators" not in s.name, "tensor" not in s.name))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*kernels, *sorted(SHIM.glob("*.cpp"))]))
    link = ["-Wl,-Bsymbolic", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    whole = [compiler, "-shared", *map(str, objects), *link, "-o"]
    library = cached("shim.so", objects, whole, lambda target: run(*whole, str(target)))
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in (*OPERATORS, *QUESTIONS, "kron_matmul", "recurrence"):
        schema = str(getattr(torch.ops.kruify, name).default._schema)
        definitions.define(schema.split("::", 1)[1])
    torch.ops.load_library(str(library))
    gpu = Gpu(ctypes.CDLL(str(library)))
    gpu.definitions = definitions  # type: ignore[attr-defined]  # for as long as the library
    return gpu


@pytest.fixture
def gpu(shim: Gpu) -> Iterator[Gpu]:
    """An H200 in place of the CPU for one test: the operators' CPU kernels are those of csrc/cuda."""
    torch_library: Any = torch.library
    overriding = torch_library.Library("kruify", "IMPL")
    for name in OPERATORS:
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        for variant in {name, name.removesuffix("_forward")}:
            overriding.impl(variant, operator, "CPU", allow_override=True)
    for name in QUESTIONS:
        overriding.impl(name, getattr(getattr(torch.ops, NAMESPACE), name), "CompositeExplicitAutograd")
    overriding.impl("layer_backward", _layer_backward, "CPU", allow_override=True)  # has no kernel of its own on CUDA
    shim.chip()
    shim.launches(), shim.tensor_products(), shim.races(), shim.barriers()
    yield shim
    shim.library.shim_watch(0), shim.library.shim_skip(0), shim.library.shim_plant(0)
    overriding._destroy()


@pytest.fixture
def watched(gpu: Gpu) -> Iterator[Gpu]:
    """The same with every access of every thread watched; nothing may have clashed when the test ends."""
    gpu.library.shim_watch(1)
    yield gpu
    found, example = gpu.races()
    assert not found, f"{found} races, for example {example}"


@pytest.fixture
def matrix():  # type: ignore[no-untyped-def]
    """A maker of matrices: (gates, rows, cols, [(gates, rank, shapes)], extras) -> Matrix in float64. `shared`: numbers
    of the terms whose gates have the last stage in common."""

    def build(gates, rows, cols, terms, diagonal=(), residual=0, block=4, bias=True, shared=()):  # type: ignore[no-untyped-def]
        stages, layouts = [], []
        for number, (own, rank, shapes) in enumerate(terms):
            scale = (len(terms) * rank * cols) ** (-0.5 / len(shapes))
            stages += [torch.randn(len(own), rank, *shape, dtype=torch.float64) * scale for shape in shapes]
            if number in shared:
                stages[-1] = stages[-1][:1].clone()
            layouts.append(TermLayout(len(shapes), tuple(own)))
        values = index = None
        if residual:
            row = torch.randint(gates, (residual, 1)) * rows + torch.randint(rows - block + 1, (residual, 1))
            index = torch.cat([row, torch.randint(cols, (residual, 1))], 1)
            index = torch.stack(sorted(index, key=lambda r: tuple(r.tolist()))).to(torch.int32)
            values = torch.randn(residual, block, dtype=torch.float64) / 4
        d = torch.randn(len(diagonal), min(rows, cols), dtype=torch.float64) / 4 if diagonal else None
        b = torch.randn(gates * rows, dtype=torch.float64) / 4 if bias else None
        return Matrix(stages, d, values, index, b, Layout(gates, rows, cols, tuple(diagonal), tuple(layouts)))

    return build


@pytest.fixture(name="cached", scope="session")
def _cached() -> Callable[..., Path]:
    return cached


ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["shim", *([ON_CUDA] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Where the CUDA kernels run: on the shim, whose tensors are on the CPU, and on the GPU where there is one."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("gpu")
    return "cpu"
