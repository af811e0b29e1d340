"""Writes one recurrent layer as a C99 file without dependencies, compiles it here and compares it with the layer."""

from __future__ import annotations

import copy
import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from kruify.conversion import densify, quantize
from kruify.conversion.storing import store_as
from kruify.errors import UnsupportedError, UsageError
from kruify.exporting.c_source import identifier, layer_source
from kruify.exporting.check import TOLERANCE, Embedded, Exported, Run, difference, layer_cases, write_checked
from kruify.exporting.layer_files import call_layer, prepare
from kruify.exporting.shapes import Interface
from kruify.layers.storage import marks

SIZES, LONG = ((1, 1), (7, 2)), ((1000, 1),)  # (time, batch)
FLAGS = ("-x", "c", "-std=c99", "-O2", "-shared", "-fPIC")


def export_c(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    dense: bool = False,
    name: str = "",
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a recurrent layer as one C99 file: `NAME_init` and `NAME_step`, one time step of one stream a call.

    NAME is that of the file. Weights are stored in eight bits as `kruify.quantize` rounds them, one float32 scale a
    row; activations, biases and the state are float32, and they are not rounded. The factors stay factors.

    Args:
        module: a KRULSTM, KRUGRU, KRURNN, one of their cells, or torch.nn's; of one direction.
        dense: write dense matrices instead of factors.
        name: of the layer, for messages and the file's first lines.
        tolerance: largest difference from the layer with its weights so rounded, over sequences of up to 1,000 steps.

    Raises:
        UsageError: not a recurrent layer, or the folder cannot be written.
        UnsupportedError: two directions, numbers that are NaN or infinite, or no C compiler to run the file with.
        TargetMissedError: the file computes something else; it is deleted.
    """
    given, interface = prepare(module, name)
    if interface.directions == 2:
        raise UnsupportedError("two directions cannot be computed step by step", name or None, "Export it to ONNX")
    path, compiler, layer = Path(path), _compiler(), interface.layer
    whole = densify(given) if dense else given
    biases = [weight for weight, _ in whole.named_parameters() if weight.startswith("bias_")]  # C has no 16-bit floats
    four = {weight: dtype for weight, dtype in marks(whole).items() if dtype == "int4"}  # these stay, each in a byte
    stored = quantize(whole, "int8", keep=[*biases, *four])
    stored = store_as(stored, {**marks(stored), **four})
    # Dense layers of torch.nn stand for them: a thousand steps through the factors take seconds.
    original, exact = (densify(m.double()) for m in (copy.deepcopy(given), copy.deepcopy(stored)))
    long = next(layer_cases(interface, torch.float32, sizes=LONG))
    with torch.no_grad():
        found = (call_layer(module, [value.double() for value in long]) for module in (exact, original))
        rounding = difference(*found)
    about = [
        f"{path.name}, written by kruify: {layer.kind.upper()} {layer.name}",
        "Weights are eight-bit integers with a float scale a row; what they are multiplied with is float.",
        f"Rounding them so changes the layer's outputs by up to {rounding:.2g} in 1000 steps of random input.",
    ]
    source = layer_source(stored, interface, path.name, identifier(path.stem), about)
    written = write_checked(
        path,
        lambda file: _write(file, source.text),
        partial(run_c, compiler, identifier(path.stem), interface, source.ram),
        partial(call_layer, copy.deepcopy(exact).float()),
        [*layer_cases(interface, torch.float32, sizes=SIZES), long],
        tolerance,
        partial(call_layer, exact),
    )
    written = replace(written, layer=layer.name, inputs=interface.inputs, outputs=interface.outputs)
    return replace(written, embedded=Embedded(source.flash, source.ram, rounding))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="ascii")


def run_c(compiler: Sequence[str], prefix: str, interface: Interface, ram: int, file: Path) -> Run:
    """The file, compiled and loaded into this process; the sequences of a batch are one stream after the other.

    Raises:
        UnsupportedError: the compiler fails.
    """
    with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
        library = Path(folder) / "layer.so"
        command = [*compiler, *FLAGS, str(file), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
            raise UnsupportedError(f"the C compiler {compiler[0]} fails ({reason[:200]})", file, "Name one with CC")
        loaded = ctypes.CDLL(str(library))
    init, step = (getattr(loaded, f"{prefix}_{part}") for part in ("init", "step"))
    init.argtypes, step.argtypes, step.restype = [c_void_p], [c_void_p, c_void_p], c_void_p
    layer = interface.layer
    turned = not interface.cell and bool(layer.batch_first)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        x, *states = inputs
        if interface.cell:  # one step of one layer
            x, *states = (value[None] for value in inputs)
        x = (x.transpose(0, 1) if turned else x).contiguous()
        output, ends = x.new_empty(*x.shape[:2], layer.output_size), [torch.empty_like(s) for s in states]
        for stream in range(x.shape[1]):
            memory = torch.full((ram // 4,), torch.nan)
            init(memory.data_ptr())
            sizes = [state[:, stream].numel() for state in states]
            held = torch.split(memory, [*sizes, memory.numel() - sum(sizes)])[:-1]
            for own, state in zip(held, states, strict=True):
                if state.any():
                    own.copy_(state[:, stream].flatten())
            for t in range(len(x)):
                got = step(memory.data_ptr(), x[t, stream].data_ptr())
                ctypes.memmove(output[t, stream].data_ptr(), got, 4 * layer.output_size)
            for end, own in zip(ends, held, strict=True):
                end[:, stream] = own.view_as(end[:, stream])
        if interface.cell:
            return [end[0] for end in ends]
        return [output.transpose(0, 1) if turned else output, *ends]

    return run


def _compiler() -> list[str]:
    """The C compiler that the environment names, or cc.

    Raises:
        UsageError: it names none that can be read. UnsupportedError: there is none.
    """
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise UsageError(f"it is no command ({error})", "CC", "Name a C compiler, as in CC=gcc") from None
    if shutil.which(command[0]) is None:
        raise UnsupportedError(
            f"there is no C compiler '{command[0]}' to run the file with",
            "C export",
            "Install gcc or clang, or name one with CC",
        )
    return command
