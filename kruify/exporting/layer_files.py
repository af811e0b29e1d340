"""Writes one recurrent layer as an ONNX model or a torch.export program, runs the file, compares it with the layer."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kruify.checkpoint.onnx_session import cpu_session
from kruify.checkpoint.summed_biases import in_full
from kruify.conversion import densify
from kruify.errors import UnsupportedError
from kruify.exporting.check import TOLERANCE, Exported, Run, layer_cases, write_checked
from kruify.exporting.scan_layer import traceable
from kruify.exporting.shapes import LENGTHS, Interface, interface_of
from kruify.graphs import compare_graphs
from kruify.layers import KroneckerMatrix
from kruify.layers.base import KRUBase
from kruify.layers.storage import marks

HALF = ("float16", "bfloat16")


def export_onnx(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    dense: bool = False,
    name: str = "",
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a recurrent layer as an ONNX model.

    The factors stay small MatMuls inside a Scan over time, which is timed beside the same layer with dense weights
    (`Exported.beside_dense`); batch and time are dynamic. Inputs: `input`, `h_0` (and
    `c_0`); outputs: `output`, `h_n` (`c_n`), in the shapes of the layer. A half-precision layer is written in float32.

    `lengths` (batch,), int64, is an input that may be left out: the steps of each sequence, as in a packed sequence of
    torch. Padding neither changes the states nor reaches the backward direction, and its output is 0.

    Args:
        module: a KRULSTM, KRUGRU, KRURNN, one of their cells, or torch.nn's.
        dense: write ONNX's own LSTM, GRU or RNN nodes with dense weights instead.
        name: of the layer, for messages and the file's metadata.
        tolerance: largest difference from the layer, found by running the file with onnxruntime.

    Raises:
        UsageError: not a recurrent layer, or the folder cannot be written.
        UnsupportedError: onnx or onnxruntime is not installed.
        TargetMissedError: the file computes something else; it is deleted.
    """
    require_package("onnx", "onnxruntime")
    from kruify.exporting.onnx_layer import layer_model

    narrow = _narrow(module)
    module, interface = prepare(module, name)

    def write(file: Path) -> None:
        file.write_bytes(layer_model(module, interface, dense=dense).SerializeToString())

    written = _write(module, interface, Path(path), write, run_onnx, tolerance, narrow)
    if dense or not any(isinstance(part, KroneckerMatrix) for part in module.modules()):
        return written
    return beside_dense(
        written, lambda file: file.write_bytes(layer_model(module, interface, dense=True).SerializeToString())
    )


def beside_dense(written: Exported, write: Callable[[Path], object]) -> Exported:
    """With the comparison of an ONNX file with the one of dense weights that `write` makes."""
    with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
        other = Path(folder) / "dense.onnx"
        write(other)
        return replace(written, beside_dense=compare_graphs(other, written.path))


def export_torch(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    dense: bool = False,
    name: str = "",
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a recurrent layer as a torch.export program that loads without kruify.

    The factors stay inside a scan over time; batch and time are dynamic. `torch.export.load(path).module()` takes
    (input, h_0) or (input, h_0, c_0) and returns (output, h_n) or (output, h_n, c_n).

    Raises:
        UsageError, TargetMissedError: as `export_onnx`.
    """
    narrow = _narrow(module)
    module, interface = prepare(module, name)
    traced = _Flat(traceable(densify(module) if dense else copy.deepcopy(module)))

    def write(file: Path) -> None:
        # An example of size 1 would fix that size.
        example = next(case for case in layer_cases(interface, _dtype(interface)) if min(case[0].shape[:-1]) > 1)
        dims = {axis: torch.export.Dim(axis, min=1) for axis in ("time", "batch")}
        shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in interface.axes())
        with quiet(), torch.no_grad():
            program = torch.export.export(traced.eval(), tuple(example), dynamic_shapes=(shapes,), strict=False)
            save_program(program, file)

    return _write(module, interface, Path(path), write, run_torch, tolerance, narrow)


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """torch.export.save by way of the memory: on a full disk torch's own writer ends the process."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())


class _Flat(nn.Module):
    """A layer with its states as separate arguments and results."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return call_layer(self.layer, inputs)


def call_layer(layer: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(input, h) or (input, h, c) -> (output, h, c); for a cell (h, c). Whole numbers as the last input are the lengths
    of padded sequences."""
    lengths = None if inputs[-1].is_floating_point() else inputs[-1]
    x, *states = inputs if lengths is None else inputs[:-1]
    state = states[0] if len(states) == 1 else tuple(states)
    if lengths is None:
        return tuple(torch.utils._pytree.tree_leaves(layer(x, state)))
    batch_first = bool(layer.batch_first)
    packed, final = layer(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), state)
    output, _ = pad_packed_sequence(packed, batch_first, total_length=x.shape[int(batch_first)])
    return (output, *torch.utils._pytree.tree_leaves(final))


def run_onnx(file: Path) -> Run:
    """The file in onnxruntime, on one CPU thread."""
    session = cpu_session(file)
    names = [value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=False)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def run_torch(file: Path) -> Run:
    """The file in torch."""
    with quiet():
        module = torch.export.load(file).module()

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        result: Sequence[Tensor] = module(*inputs)
        return result

    return run


def prepare(module: nn.Module, name: str) -> tuple[nn.Module, Interface]:
    """A copy on the CPU, in evaluation mode, on the readable path, in float32 if it was in half precision."""
    interface_of(module, name)  # raises for what is no recurrent layer
    module = copy.deepcopy(module).cpu().eval()
    if interface_of(module).layer.dtype in HALF:
        module = module.float()
    if isinstance(module, KRUBase):
        module.backend = "reference"
    return module, interface_of(module, name)


def _narrow(module: nn.Module) -> set[str]:
    """Dtypes of fewer than 32 bits that the weights of a layer are stored in."""
    held = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    return {*in_full(marks(module)).values(), *(held & {*HALF})}


def _write(
    module: nn.Module,
    interface: Interface,
    path: Path,
    write: Callable[[Path], None],
    load: Callable[[Path], Run],
    tolerance: float,
    narrow: set[str],
) -> Exported:
    padded = load is run_onnx and not interface.cell
    cases = layer_cases(interface, _dtype(interface), padded=padded)
    exact = partial(call_layer, copy.deepcopy(module).double())
    written = write_checked(path, write, load, partial(call_layer, module), cases, tolerance, exact)
    optional = (LENGTHS,) if padded else ()
    written = replace(written, inputs=interface.inputs, outputs=interface.outputs, optional=optional)
    return replace(written, layer=interface.layer.name, widened=tuple(sorted(narrow)))


def _dtype(interface: Interface) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, interface.layer.dtype)
    return dtype


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export's warnings and log lines, and the graph that it prints when it fails, are about its own workings."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def require_package(*names: str) -> None:
    """Raises `UnsupportedError` with the command that installs what is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UnsupportedError(
                f"the package {name} is not installed", "ONNX export", "Run: pip install 'kruify[onnx]'"
            ) from None
