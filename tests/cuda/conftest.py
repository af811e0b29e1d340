"""The CUDA kernels' phases on the CPU (phases.cpp), and nvcc, each built once per content of the sources."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kruify.ops.layout import Layout, TermLayout
from kruify.ops.reference import GATES, MODRELU, WORKSPACE

sys.path.insert(0, str(Path(__file__).parent))  # phase_cases, shared by the tests here

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kruify" / "csrc"
KINDS = tuple(GATES)


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


class Options(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int)
        for n in (
            "processors",
            "shared_memory",
            "clusters",
            "order",
            "cluster",
            "tile",
            "fixed",
            "precision",
            "skipped",
        )
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *[
            (n, ctypes.c_void_p)
            for n in ("code", "shapes", "stages", "diagonal", "residual", "bias", "index", "starts")
        ],
        *[(n, ctypes.c_int) for n in ("codes", "stage_count", "blocks", "block", "kind", "steps", "batch", "reverse")],
    ]


def options(**given: int) -> Options:
    """A run on an H200 with the templates of the fixed shapes, unless `given` says otherwise."""
    return Options(**({"processors": 132, "shared_memory": 232448, "clusters": 1, "fixed": 1} | given))


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


def _pointer(t: Tensor | None) -> int | None:
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[_pointer(t) for t in tensors])


class Phases:
    """The operators as the CUDA machine would run them, on CPU tensors.

    Of the last call: `templates`, launches of two-stage kernels; `tensors`, how many of them on tensor cores.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.templates, self.tensors = library, 0, 0

    def _problem(
        self, m: Matrix, kind: str = "lstm", sizes: Tensor | None = None, reverse: bool = False, batch: int = 0
    ) -> _Problem:
        code, starts = m.layout.encode(), None
        self._code = (ctypes.c_int64 * len(code))(*code)
        shapes = [n for s in m.stages for n in s.shape[1:]]
        self._shapes = (ctypes.c_int * max(1, len(shapes)))(*shapes)
        self._stages = _pointers(m.stages)
        if sizes is not None and len(sizes) and sizes[0] != sizes[-1]:
            values = [0, *sizes.cumsum(0).tolist()]
            self._starts = (ctypes.c_int * len(values))(*values)
            starts = ctypes.cast(self._starts, ctypes.c_void_p)
        blocks, block = (0, 0) if m.residual is None else m.residual.shape
        return _Problem(
            *[ctypes.cast(array, ctypes.c_void_p) for array in (self._code, self._shapes, self._stages)],
            _pointer(m.diagonal), _pointer(m.residual), _pointer(m.bias), _pointer(m.index), starts,
            len(code), len(m.stages), blocks, block, KINDS.index(kind),
            0 if sizes is None else len(sizes), batch, int(reverse),
        )  # fmt: skip

    def _call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        function = getattr(self.library, f"{name}_{'float' if dtype == torch.float32 else 'double'}")
        launches = function(*arguments)
        if launches < 0:
            self.library.what.restype = ctypes.c_char_p
            raise RuntimeError(self.library.what().decode())
        self.tensors, self.templates = divmod(launches, 1000)

    def recurrence(self, x, sizes, h0, c0, m, kind, reverse, o):  # type: ignore[no-untyped-def]
        out, h, c = (torch.full_like(t, float("nan")) for t in (x[:, : h0.shape[1]].contiguous(), h0, h0))
        workspace = torch.full((x.shape[0], WORKSPACE[kind] * h0.shape[1]), float("nan"), dtype=x.dtype)
        problem = self._problem(m, kind, sizes, reverse, h0.shape[0])
        self._call(
            "forward",
            x.dtype,
            ctypes.byref(problem),
            ctypes.byref(o),
            _pointers([x, h0, c0]),
            _pointers([out, h, c, workspace]),
        )
        return out, h, c if kind == "lstm" else None, workspace

    def recurrence_backward(self, grad_out, grad_h, grad_c, out, workspace, sizes, h0, c0, m, kind, reverse, o):  # type: ignore[no-untyped-def]
        gates = torch.full((out.shape[0], GATES[kind] * h0.shape[1]), float("nan"), dtype=out.dtype)
        dh, dc = torch.full_like(h0, float("nan")), torch.full_like(h0, float("nan"))
        grads = [
            None if t is None else torch.full_like(t, float("nan")) for t in (*m.stages, m.diagonal, m.residual, m.bias)
        ]
        problem = self._problem(m, kind, sizes, reverse, h0.shape[0])
        given = _pointers([grad_out, grad_h, grad_c, out, workspace, h0, c0])
        self._call("backward", out.dtype, ctypes.byref(problem), ctypes.byref(o), given,
                   _pointers([gates, dh, dc]), _pointers(grads), ctypes.c_int64(out.shape[0]))  # fmt: skip
        return gates, dh, dc if kind == "lstm" else None, [g for g in grads if g is not None]

    def kron_matmul(self, x: Tensor, m: Matrix, o: Options) -> Tensor:
        y = torch.full((x.shape[0], m.layout.gates * m.layout.rows), float("nan"), dtype=x.dtype)
        problem = self._problem(m)
        self._call(
            "multiply",
            x.dtype,
            ctypes.byref(problem),
            ctypes.byref(o),
            ctypes.c_void_p(_pointer(x)),
            ctypes.c_void_p(_pointer(y)),
            ctypes.c_int64(x.shape[0]),
        )
        return y

    def kron_matmul_backward(self, grad: Tensor, x: Tensor, m: Matrix, o: Options) -> tuple[Tensor, list[Tensor]]:
        grad_x = torch.full_like(x, float("nan"))
        grads = [
            None if t is None else torch.full_like(t, float("nan")) for t in (*m.stages, m.diagonal, m.residual, m.bias)
        ]
        problem = self._problem(m)
        given = [ctypes.c_void_p(_pointer(t)) for t in (grad, x, grad_x)]
        self._call("multiply_backward", x.dtype, ctypes.byref(problem), ctypes.byref(o), *given,
                   _pointers(grads), ctypes.c_int64(x.shape[0]))  # fmt: skip
        return grad_x, [g for g in grads if g is not None]

    def merge(self, factors: Sequence[Tensor], o: Options) -> Tensor:
        """The stage (pairs, rows, cols) of factors (pairs, P, Q)."""
        rows, cols = (math.prod(f.shape[k] for f in factors) for k in (1, 2))
        out = torch.full((factors[0].shape[0], rows, cols), float("nan"), dtype=factors[0].dtype)
        self._call("merge", out.dtype, *self._chain(factors), ctypes.byref(o), ctypes.c_void_p(_pointer(out)))
        return out

    def merge_backward(self, grad: Tensor, factors: Sequence[Tensor], o: Options) -> list[Tensor]:
        grads = [torch.full_like(f, float("nan")) for f in factors]
        given = (ctypes.byref(o), ctypes.c_void_p(_pointer(grad)), _pointers(grads))
        self._call("merge_backward", grad.dtype, *self._chain(factors), *given)
        return grads

    def _chain(self, factors: Sequence[Tensor]) -> tuple[object, ...]:
        shapes = [n for f in factors for n in f.shape[1:]]
        return factors[0].shape[0], len(factors), (ctypes.c_int * len(shapes))(*shapes), _pointers(factors)

    def races(self) -> tuple[int, str]:
        """Clashes of threads since the last call, and one of them; of a library that watches (fixture `races`)."""
        self.library.races_found.restype, self.library.race.restype = ctypes.c_int64, ctypes.c_char_p
        return self.library.races_found(), self.library.race().decode()

    def barriers(self) -> int:
        """The most barriers that a block of a kernel has met since the last call."""
        return int(self.library.barriers())

    def fits(self, kind: str, rows1: int, rows2: int, rank: int, training: bool, o: Options) -> bool:
        """Whether the two-stage kernels take any batch."""
        return bool(self.library.fits(GATES[kind], rank, rows1, rows2, int(training), ctypes.byref(o)))

    def choice(
        self, kind: str, rows1: int, rows2: int, rank: int, batch: int, backward: bool, o: Options
    ) -> tuple[int, int, int, int, int]:
        """(cluster, threads, tile columns, bytes of shared memory, precision) of a launch; cluster 0: none fits."""
        found = (ctypes.c_int * 5)()
        self.library.pair_choice(KINDS.index(kind), rows1, rows2, rank, batch, ctypes.byref(o), int(backward), found)
        return tuple(found)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def phases() -> Phases:
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler to build the phases with")
    return _built(compiler, "phases.so", [("phases.cpp", ())])


@pytest.fixture(scope="session")
def races() -> Phases:
    """The phases with every access to memory watched; much slower. Its tests need no template of a fixed shape."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, whose -fsanitize=thread tells of every access")
    watched = ("-DKRUIFY_RACES", "-fsanitize=thread", "-DKRUIFY_FIXED_SHAPES(_)=")
    return _built("g++", "races.so", [("phases.cpp", watched), ("races.cpp", ("-DKRUIFY_RACES",))])


def _built(compiler: str, name: str, parts: list[tuple[str, tuple[str, ...]]]) -> Phases:
    """The library of these sources, each with flags of its own."""
    folder = Path(__file__).parent
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", f"-I{CSRC}"]

    def run(arguments: Sequence[str]) -> None:
        done = subprocess.run(arguments, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def build(target: Path) -> None:
        objects = [f"{target}.{k}.o" for k in range(len(parts))]
        for (source, flags), output in zip(parts, objects, strict=True):
            run([*command, *flags, "-c", str(folder / source), "-o", output])
        run([compiler, "-shared", *objects, "-o", str(target)])
        for output in objects:
            os.unlink(output)

    sources = [*folder.glob("*.cpp"), *folder.glob("*.h"), *CSRC.rglob("*.h")]
    return Phases(ctypes.CDLL(str(cached(name, sorted(sources), [*command, repr(parts)], build))))


@pytest.fixture(name="options", scope="session")
def _options() -> Callable[..., Options]:
    return options


@pytest.fixture
def matrix():  # type: ignore[no-untyped-def]
    """A maker of matrices: (gates, rows, cols, [(gates, rank, shapes)], extras) -> Matrix in float64."""

    def build(gates, rows, cols, terms, diagonal=(), residual=0, block=4, bias=True):  # type: ignore[no-untyped-def]
        stages, layouts = [], []
        for own, rank, shapes in terms:
            scale = (len(terms) * rank * cols) ** (-0.5 / len(shapes))
            stages += [torch.randn(len(own), rank, *shape, dtype=torch.float64) * scale for shape in shapes]
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
