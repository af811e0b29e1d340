"""Every export is run after it is written and compared with the layer; a file that differs is not left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.errors import KruifyError, TargetMissedError, UsageError
from kruify.exporting.shapes import Interface
from kruify.graphs import Comparison, NodeForm

TOLERANCE = 1e-5
ROUNDING = 1e-6
MOST = 1e3  # by how much at the most a layer that amplifies rounding widens the tolerance
"""What float32 may differ from float64 in a layer that does not amplify it."""
SIZES = ((1, 1), (2, 3), (7, 1), (5, 4), (19, 2))  # (time, batch)

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Embedded:
    """What a layer in C takes where it runs.

    Attributes:
        flash: bytes of constants; the code is beside them.
        ram: bytes of the state of one stream.
        rounding: largest difference of outputs and states, as `difference` counts it, that comes of storing the weights
            in eight bits: 1,000 steps of random input.
    """

    flash: int
    ram: int
    rounding: float


@dataclass(frozen=True)
class Exported:
    """One file that was written, run and compared.

    Attributes:
        path: the file.
        layer: the layer that it holds, "" for a bare layer or a whole model.
        inputs, outputs: their names, in order; empty for a state dict.
        optional: inputs that may be left out: ("lengths",) for a layer in ONNX.
        difference: largest difference from the layer in float64 over all cases, absolute where values are below 1, and
            in units of what rounding does to the layer itself where it does more than usual (`compare`).
        cases: how many were compared.
        bytes: size of the file.
        graph: of a whole ONNX graph, how it compares with the original in onnxruntime; `difference` and `cases` are
            then of its weights.
        forms: of its recurrent nodes with factors, where a form was asked for.
        embedded: of a C file, what it takes; `difference` is then that from the layer with its weights in eight bits.
        beside_dense: of factors in ONNX, how the file compares with one of dense weights in onnxruntime.
        assumed: what the checkpoint does not tell and was taken for granted.
        widened: dtypes in which the model stores weights that the file holds in full, as float32 or float64.
    """

    path: Path
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float
    cases: int
    bytes: int
    assumed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    graph: Comparison | None = None
    forms: tuple[NodeForm, ...] = ()
    embedded: Embedded | None = None
    beside_dense: Comparison | None = None
    widened: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One entry of `outputs` of `kruify export --json`."""
        return {
            "output": str(self.path),
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in vars(self).items()
                if name not in ("path", "graph", "forms", "embedded", "beside_dense")
            },
            **({} if self.graph is None else {"graph": self.graph.to_json()}),
            **({"forms": [asdict(form) for form in self.forms]} if self.forms else {}),
            **({} if self.embedded is None else asdict(self.embedded)),
            **({} if self.beside_dense is None else {"beside_dense": self.beside_dense.to_json()}),
        }


def layer_cases(
    interface: Interface,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    padded: bool = False,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Iterator[list[Tensor]]:
    """Inputs over several lengths and batch sizes, each with a zero, an ordinary and a large initial state.

    Args:
        padded: one case of three has the lengths of its sequences as its last tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    for steps, batch in sizes:
        if interface.cell and steps > 1:
            steps = 1
        for scale in (0.0, 0.5, 3.0):
            shapes = interface.input_shapes(steps, batch)
            values = [torch.randn(*map(int, shape), generator=generator, dtype=torch.float64) for shape in shapes]
            case = [(value * (scale if place else 1.0)).to(dtype) for place, value in enumerate(values)]
            if padded and scale == 0.5:
                case.append(torch.randint(1, steps + 1, (batch,), generator=generator))
            yield case


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of its tensor where that is above 1; infinite where one side
    has a shape, a NaN or an infinity that the other has not."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not torch.isfinite(a).equal(torch.isfinite(b)):
            return float("inf")
        a, b = a.detach().double().nan_to_num(), b.detach().double().nan_to_num()
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1.0)))
    return worst


def compare(
    exported: Run, original: Run, cases: Iterable[Sequence[Tensor]], exact: Run | None = None
) -> tuple[float, int]:
    """Runs both on every case; returns the largest difference and the number of cases.

    Args:
        exact: the original in float64, which the exported file is compared with. Where rounding alone takes the
            original further from it than `ROUNDING`, the difference is that many times smaller.
    """
    worst, count = 0.0, 0
    with torch.no_grad():
        for case in cases:
            got, wanted, scale = exported(case), original(case), 1.0
            if exact is not None:
                precise = exact([value.double() if value.is_floating_point() else value for value in case])
                rounding = difference(wanted, precise)
                if isfinite(rounding):  # what overflows in float32 alone is compared in float32
                    wanted, scale = precise, min(max(1.0, rounding / ROUNDING), MOST)
            worst = max(worst, difference(got, wanted) / scale)
            count += 1
    return worst, count


def require(found: float, tolerance: float, path: Path) -> None:
    """Raises `TargetMissedError` where the difference is above the tolerance; the caller's file is deleted by it."""
    if not found <= tolerance:
        raise TargetMissedError(
            f"the exported file differs from what it was made of by {found:.2g}, above {tolerance:.2g}",
            path,
            "The new file was deleted. Report this, or allow more with --tolerance",
        )


def write_checked(
    path: Path,
    write: Callable[[Path], None],
    load: Callable[[Path], Run],
    original: Run,
    cases: Iterable[Sequence[Tensor]],
    tolerance: float,
    exact: Run | None = None,
) -> Exported:
    """Writes a file, runs it, and compares it with the original; names are left to the caller.

    Raises:
        UsageError: the folder is missing or read-only.
        TargetMissedError: the file differs; it is not left behind.
    """
    with staged(path) as file:
        write(file)
        found, count = compare(load(file), original, cases, exact)
        require(found, tolerance, path)
        return Exported(path, "", (), (), found, count, file.stat().st_size)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, with its ending, that takes its place if the block ends without an error.

    Raises:
        UsageError: the folder is missing or read-only.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UsageError(f"it cannot be written ({error.strerror})", path, "Check the folder") from None
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except KruifyError as error:
        if name not in str(error.where):
            raise
        raise type(error)(error.what, str(error.where).replace(name, str(path)), error.hint) from None
    except OSError as error:
        raise UsageError(f"it cannot be written ({error.strerror})", path, "Check the folder") from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
