"""Writes what a checkpoint holds: its recurrent layers one by one, its dense state dict, or a task's whole network."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kruify.analysis.layers import layers_of
from kruify.checkpoint import (
    NEEDS_SOURCE,
    ORIGIN,
    Checkpoint,
    read,
    write_original,
    write_safetensors,
    write_torch,
)
from kruify.checkpoint.summed_biases import in_full
from kruify.checkpoint.target import TORCH
from kruify.conversion import densify, densify_tensors
from kruify.conversion.check import bounded_plan
from kruify.conversion.locate import KRU_KINDS, RecurrentLayer
from kruify.conversion.network import dense_note
from kruify.errors import KruifyError, UnsupportedError, UsageError, first_line
from kruify.exporting.c_file import export_c
from kruify.exporting.check import TOLERANCE, Exported, compare, layer_cases, require, staged, write_checked
from kruify.exporting.layer_files import (
    beside_dense,
    call_layer,
    export_onnx,
    export_torch,
    quiet,
    require_package,
    run_onnx,
    run_torch,
    save_program,
)
from kruify.exporting.scan_layer import traceable
from kruify.exporting.shapes import interface_of, no_kru
from kruify.graphs import SmallGraph, compare_graphs, write_in_form
from kruify.layers.base import KRUBase
from kruify.layers.storage import marks
from kruify.progress import Progress
from kruify.tasks.base import Task, to_device

Format = Literal["onnx", "torch"]
WRITERS = {"c": export_c, "onnx": export_onnx, "torch": export_torch}
ONE_BY_ONE = "Leave --task out: the recurrent layers are then exported one by one"


def export_layers(
    checkpoint: Checkpoint,
    to: Literal["c", "onnx", "torch"],
    path: Path,
    *,
    dense: bool = False,
    batch_first: bool | None = None,
    nonlinearity: str | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> list[Exported]:
    """Each recurrent layer of a checkpoint by itself; with several, the layer's name goes before the ending of `path`.

    Args:
        batch_first: layout of input and output; None takes the layer's, (time, batch, features) where the file does
            not say.
        nonlinearity: "tanh" or "relu", of plain RNNs where the file does not say, as no state dict does; None takes
            tanh. What was assumed is in `Exported.assumed`.
        progress: told of the layers.

    Raises:
        UsageError: the file has no recurrent layer, or `nonlinearity` contradicts the file or has no RNN to act on.
        TargetMissedError: an exported file differs from its layer; it is deleted.
    """
    found = layers_of(checkpoint)
    if nonlinearity is not None and all(layer.kind != "rnn" for layer, _ in found.items):
        raise UsageError("there is no plain RNN whose nonlinearity could be set", checkpoint.path, "Leave it out")
    completed = [_completed(layer, batch_first, nonlinearity, checkpoint.path) for layer, _ in found.items]
    layers = replace(
        found, items=[(layer, matrices) for layer, (_, matrices) in zip(completed, found.items, strict=True)]
    )
    exported = list[Exported]()
    for layer, module in zip(completed, layers.modules(), strict=True):
        if progress is not None:
            progress(len(exported), len(completed), f"exporting and comparing: {layer.name}")
        file = path if len(completed) == 1 else path.with_name(f"{path.stem}.{layer.name}{path.suffix}")
        written = WRITERS[to](module, file, dense=dense, name=layer.name, tolerance=tolerance)
        exported.append(replace(written, assumed=(*_assumed(layer, to), *_unsaid(checkpoint, [layer.name]))))
    return exported


def _completed(
    layer: RecurrentLayer, batch_first: bool | None, nonlinearity: str | None, where: object
) -> RecurrentLayer:
    """The layer with what the caller knows and the file does not say."""
    if batch_first is not None and not layer.cell:
        layer = replace(layer, batch_first=batch_first)
    if nonlinearity is None or layer.kind != "rnn" or layer.nonlinearity == nonlinearity:
        return layer
    if layer.nonlinearity is not None:
        raise UsageError(
            f"the file says that '{layer.name}' is an RNN with {layer.nonlinearity}", where, "Leave it out"
        )
    return replace(layer, nonlinearity=nonlinearity)


def _assumed(layer: RecurrentLayer, to: str) -> tuple[str, ...]:
    unknown = []
    if layer.kind == "rnn" and layer.nonlinearity is None:
        unknown.append("tanh")
    if layer.batch_first is None and not layer.cell and to != "c":  # which takes one step of one sequence
        unknown.append("time before batch")
    return tuple(unknown)


def _unsaid(checkpoint: Checkpoint, layers: Iterable[str]) -> tuple[str, ...]:
    """What the file that was converted did not say of its layers: Keras weights without a configuration."""
    return tuple(f"{name}: {checkpoint.assumed[name]}" for name in layers if name in checkpoint.assumed)


def export_dense(
    checkpoint: Checkpoint,
    path: Path,
    *,
    source: Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Exported:
    """The dense model, for nn.LSTM and friends.

    Where the ending of `path` is that of the file that was converted, that kind of file is written again, with its
    names and its wrapper; else a state dict, as .pt, .pth or .safetensors.

    Args:
        source: the file that was converted; needed where it was more than its tensors (whole module, ONNX, Keras).
        progress: told of the layers that are compared.

    Raises:
        UsageError: kruify did not convert the file, or the ending is unknown.
        UnsupportedError: it holds a layer that torch.nn does not know.
        TargetMissedError: a dense layer differs from the Kronecker layer; the file is deleted.
    """
    if not checkpoint.is_kruify:
        raise UsageError("it is dense already: it carries no plan", checkpoint.path, "Export a converted file")
    plan = bounded_plan(checkpoint)
    if any(item.layer.kind in KRU_KINDS for item in plan.layers):
        raise no_kru(checkpoint.path)
    write = _dense_writer(checkpoint, path, source)
    dense = densify_tensors(checkpoint.tensors, plan)
    with staged(path) as file:
        write(file, dense)
        worst, count = 0.0, 0
        converted, written = layers_of(checkpoint), layers_of(read(file))
        modules = {layer.name: module for (layer, _), module in zip(written.items, written.modules(), strict=True)}
        for place, ((layer, _), module) in enumerate(zip(converted.items, converted.modules(), strict=True)):
            if progress is not None:
                progress(place, len(converted.items), f"comparing: {layer.name}")
            if layer.name not in converted.planned:
                continue
            other = modules.get(layer.name)
            if other is None:
                raise UnsupportedError(f"the dense layer '{layer.name}' was not found again", path, "Report this")
            found, cases = _compare_layers(module, other, layer.nonlinearity)
            worst, count = max(worst, found), count + cases
        require(worst, max(tolerance, rounding(dense)), path)
        size = file.stat().st_size
    widened = tuple(sorted({*in_full(checkpoint.storage).values()}))
    return Exported(path, "", (), (), worst, count, size, _unsaid(checkpoint, checkpoint.assumed), widened=widened)


def export_graph(checkpoint: Checkpoint, path: Path, original: Path, form: str = "folded") -> Exported:
    """The ONNX model that was converted, with the small weights in it (`graphs.write_in_form`).

    Raises:
        UsageError: kruify did not convert the file, or not from an ONNX model.
    """
    if not checkpoint.is_kruify or _format_of(checkpoint.metadata.get(ORIGIN)) != "onnx":
        raise UsageError("it was not converted from an ONNX model", checkpoint.path, "Leave --original out")
    structures = bounded_plan(checkpoint).structures()
    small = SmallGraph(original, checkpoint.tensors.lazy, structures, checkpoint.storage, graph=False)
    made, forms = write_in_form(small, path, form)
    graph, cases = compare_graphs(original, made.path), len(structures)
    return Exported(path, "", (), (), made.max_error, cases, made.bytes_after, graph=graph, forms=tuple(forms))


def rounding(tensors: Mapping[str, Tensor]) -> float:
    """What dense weights of half precision differ by from their factors: the dtype's own step, 0 for wider ones."""
    halves = {t.dtype for t in tensors.values()} & {torch.float16, torch.bfloat16}
    return max((torch.finfo(dtype).eps for dtype in halves), default=0.0)


ENDINGS = {
    "torch": (*TORCH, ""),
    "torch-legacy": (*TORCH, ""),
    "torch-module": (*TORCH, ""),
    "torchscript": (".pt", ".pth", ".ts"),
    "safetensors": (".safetensors",),
    "safetensors-sharded": (".json",),
    "torch-sharded": (".json",),
    "npz": (".npz",),
    "onnx": (".onnx",),
    "keras": (".h5", ".hdf5", ".keras"),
}
"""Formats of `kruify.checkpoint` that one file can hold -> endings by which they are meant."""


def _dense_writer(checkpoint: Checkpoint, path: Path, source: Path | None) -> Callable[[Path, dict[str, Tensor]], None]:
    """The original kind where it is known, meant by the ending, and possible; else a state dict."""
    note = checkpoint.metadata.get(ORIGIN)
    kind = _format_of(note)
    if note is not None and path.suffix in ENDINGS.get(kind, ()) and (source or kind not in NEEDS_SOURCE):
        return lambda file, tensors: write_original(file, tensors, note, source=source)
    if path.suffix == ".safetensors":
        return lambda file, tensors: write_safetensors(file, tensors, dense_note(checkpoint.metadata))
    if path.suffix in TORCH:
        return write_torch
    hint = (
        "Give the original file with --original, or write .pt, .pth or .safetensors" if kind in NEEDS_SOURCE else None
    )
    raise UsageError(f"the ending '{path.suffix}' is unknown", path, hint or "Write .pt, .pth or .safetensors")


def _format_of(note: str | None) -> str:
    try:
        return str(json.loads(note or "{}")["format"])
    except (ValueError, TypeError, KeyError):
        return ""


def _compare_layers(kru: nn.Module, dense: nn.Module, nonlinearity: str | None) -> tuple[float, int]:
    """In float32 at least: torch's kernels and the factors' order of summation differ more in half precision."""
    if nonlinearity == "relu" and isinstance(dense, nn.RNN):
        dense.mode, dense.nonlinearity = "RNN_RELU", "relu"
    for module in (kru, dense):
        if next(module.parameters()).dtype in (torch.float16, torch.bfloat16):
            module.float()
    if isinstance(kru, KRUBase):
        kru.backend = "reference"
        cast(Any, dense).batch_first = kru.batch_first
    interface = interface_of(kru)
    cases = layer_cases(interface, getattr(torch, interface.layer.dtype))
    exact = partial(call_layer, copy.deepcopy(kru).double())
    return compare(partial(call_layer, dense), partial(call_layer, kru), cases, exact)


def export_network(
    model: nn.Module,
    task: Task,
    to: Format,
    path: Path,
    *,
    dense: bool = False,
    split: str = "test",
    tolerance: float = TOLERANCE,
) -> Exported:
    """A task's whole network, as `Task.forward` calls it.

    The example is the first batch of `split`; every size that torch's tracing does not fix is dynamic. The inputs are
    the tensors that `Task.forward` gives to the network, in order.

    Raises:
        UnsupportedError: the network does something that torch.export cannot trace (a loop or a branch that depends on
            data, packed sequences), or onnxscript is missing.
        TargetMissedError: the file differs from the network on one of the first batches; it is deleted.
    """
    if to == "onnx":
        require_package("onnx", "onnxruntime", "onnxscript")
    widened = tuple(sorted({*in_full(marks(model)).values()}))
    model = (densify(model) if dense else copy.deepcopy(model)).cpu().eval()
    for module in model.modules():
        if isinstance(module, KRUBase):
            module.backend = "reference"
    calls = list(_calls(model, task, split))
    layers: list[nn.Module] = []
    if to == "onnx":
        from kruify.exporting.onnx_network import with_gaps

        prepared = with_gaps(copy.deepcopy(model), layers)
    else:
        prepared = traceable(copy.deepcopy(model))
    example, spec = calls[0]
    traced, original = _Network(prepared, spec).eval(), _Network(model, spec).eval()

    def write(file: Path) -> None:
        with _failing("torch cannot trace the whole network", model):
            _trace(traced, layers, example, to, file)

    load = run_onnx if to == "onnx" else run_torch
    cases = (tensors for tensors, _ in calls)
    with _failing("what torch wrote does not run on the first batches", model):
        written = write_checked(path, write, load, lambda case: original(*case), cases, tolerance)
    inputs = tuple(f"input_{i}" for i in range(len(example)))
    written = replace(written, inputs=inputs, outputs=("output",), widened=widened)
    if to != "onnx" or dense or not any(isinstance(module, KRUBase) for module in model.modules()):
        return written
    dense_network = partial(export_network, model, task, to, dense=True, split=split, tolerance=tolerance)
    return beside_dense(written, dense_network)


class _Network(nn.Module):
    """The network as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, spec: Any) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = torch.utils._pytree.tree_unflatten(list(tensors), self.spec)
        leaves = torch.utils._pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _calls(model: nn.Module, task: Task, split: str, count: int = 3) -> Iterator[tuple[list[Tensor], Any]]:
    """The arguments that the task's forward gives to the network for the first batches, flattened, with the way back.

    Raises:
        UnsupportedError: the network takes something other than tensors, or the task does not call it.
    """
    for batch in itertools.islice(task.batches(split), count):
        caught: list[tuple[Any, Any]] = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, caught=caught: caught.append((args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                task.forward(model, to_device(batch, torch.device("cpu")))
        finally:
            handle.remove()
        if not caught:
            raise UnsupportedError("the task does not call its network as a whole", type(task).__name__, ONE_BY_ONE)
        leaves, spec = torch.utils._pytree.tree_flatten(caught[0])
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise UnsupportedError("its forward takes something other than tensors", type(model).__name__, ONE_BY_ONE)
        # torch.export would take the sizes of what a view is a part of (tokens[:, :-1]) for conditions on the input.
        yield [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves], spec


def _trace(network: nn.Module, layers: Sequence[nn.Module], example: Sequence[Tensor], to: Format, file: Path) -> None:
    dynamic = tuple({axis: torch.export.Dim.AUTO for axis in range(tensor.dim())} for tensor in example)
    with quiet(), torch.no_grad():
        if to == "onnx":
            from kruify.exporting.onnx_network import network_model

            file.write_bytes(network_model(network, layers, example).SerializeToString())
            return
        program = torch.export.export(network, tuple(example), dynamic_shapes=(dynamic,), strict=False)
        save_program(program, file)


@contextmanager
def _failing(what: str, model: nn.Module) -> Iterator[None]:
    """Errors of torch and onnxruntime as `UnsupportedError`, with what was at the bottom of them."""
    try:
        yield
    except (KruifyError, OSError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sentence = f"{what} ({type(cause).__name__}: {first_line(cause)})"
        raise UnsupportedError(sentence, type(model).__name__, ONE_BY_ONE) from error
