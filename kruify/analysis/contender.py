"""The dense network in eight bits by dynamic quantisation, which takes one line and no training: what a converted
network has to beat. By torch, and by ONNX Runtime where it is installed."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.analysis.latency import runner
from kruify.analysis.layers import Layers
from kruify.checkpoint.onnx_session import cpu_session
from kruify.conversion.network import load_network
from kruify.errors import UnsupportedError
from kruify.tasks.base import Task, measure

QUANTISED = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.Linear}  # torch has no eight-bit nn.RNN
_REFUSALS = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError)  # what torch says no with


@dataclass(frozen=True)
class Contender:
    """What is known of the dense network in eight bits.

    Attributes:
        name: which int8 it is.
        layers: the recurrent layers, to be timed.
        metrics: of the task, where there is one and the network runs; else empty.
        bytes: of its file.
        weight_bytes: of the tensors in it.
        made: by what.
    """

    name: str
    layers: Layers
    metrics: dict[str, float]
    bytes: int
    weight_bytes: int
    made: str


class TorchLayers(Layers):
    """The recurrent layers of a dense checkpoint, quantised by torch."""

    def modules(self) -> list[nn.Module]:
        return [dynamic_int8(module) for module in super().modules()]


def torch_int8(dense: Layers, task: Task | None, split: str) -> Contender:
    """Quantises a dense network with torch and evaluates it; without a task, its recurrent layers alone.

    Raises:
        UnsupportedError: torch cannot quantise or run it.
        KruifyError: the checkpoint does not fit the task.
    """
    layers = TorchLayers(dense.checkpoint, dense.items, dense.planned)
    try:
        runner(layers, layers.modules(), 1, 1)()
    except _REFUSALS as error:
        raise _refused(error) from error
    if task is None:
        own = layers.modules()
        state: dict[str, Any] = {f"{i}.{n}": t for i, module in enumerate(own) for n, t in module.state_dict().items()}
        size = _file_bytes(_beside(dense) | state)
        return Contender("int8", layers, {}, *size, "torch.ao.quantization.quantize_dynamic")
    found = int8_network(load_network(dense.checkpoint, task), task, split)
    return Contender("int8", layers, *found, "torch.ao.quantization.quantize_dynamic")


def int8_network(network: nn.Module, task: Task, split: str) -> tuple[dict[str, float], int, int]:
    """Of a network as torch quantises it the metrics, the bytes of its file and those of the tensors in that.

    Raises:
        UnsupportedError: torch cannot quantise it, or the task cannot use what torch makes of it.
    """
    try:
        small = dynamic_int8(network)
    except _REFUSALS as error:
        raise _refused(error) from error
    try:
        metrics = measure(task, small, split)
    except MemoryError:
        raise
    except Exception as error:  # a task may do with its network what a quantised one does not know
        raise _refused(error) from error
    return metrics, *_file_bytes(small.state_dict())


def dynamic_int8(module: nn.Module) -> nn.Module:
    """A copy of a module whose layers in `QUANTISED` are torch's eight-bit ones.

    Raises:
        UnsupportedError: this torch has no dynamic quantisation, or nothing in the module is of such a layer.
    """
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        raise UnsupportedError("this torch has no quantize_dynamic") from None
    if not any(type(part) in QUANTISED for part in module.modules()):
        raise UnsupportedError("torch has no eight-bit form of its layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        # It replaces children only, so that a layer needs a parent.
        small = quantize_dynamic(nn.ModuleList([module]), QUANTISED, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    found: nn.Module = small[0].eval()
    return found


@dataclass(frozen=True)
class OnnxLayers(Layers):
    """The recurrent layers of a dense checkpoint, quantised by ONNX Runtime."""

    models: tuple[bytes, ...] = ()

    def modules(self) -> list[nn.Module]:
        return [_Session(model) for model in self.models]


def onnxruntime_int8(dense: Layers) -> Contender:
    """Quantises the LSTM layers of a network with ONNX Runtime, which leaves GRU and RNN nodes in float32.

    Raises:
        UnsupportedError: onnx or onnxruntime is not installed, a layer is no LSTM or is not exported.
    """
    try:
        import onnx  # noqa: F401
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        raise UnsupportedError("onnx or onnxruntime is not installed") from None
    modules = [m for m in dense.modules() if isinstance(m, nn.LSTM) and not m.proj_size]
    if len(modules) < len(dense.items):
        raise UnsupportedError("ONNX Runtime quantises no layer but LSTM")
    models = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        for module in modules:
            example, axes = (torch.zeros(2, 2, module.input_size),), {"x": {0: "a", 1: "b"}}
            try:
                torch.onnx.export(
                    _Output(module.float()), example, file, dynamo=False, opset_version=17,
                    input_names=["x"], dynamic_axes=axes,
                )  # fmt: skip
                quantize_dynamic(file, small)
            except _REFUSALS as error:
                raise _refused(error) from error
            models.append(small.read_bytes())
    beside, size = _file_bytes(_beside(dense)), sum(map(len, models))
    layers = OnnxLayers(dense.checkpoint, dense.items, dense.planned, tuple(models))
    made = "onnxruntime.quantization.quantize_dynamic"
    return Contender("int8, ONNX Runtime", layers, {}, beside[0] + size, beside[1] + size, made)


@contextmanager
def _quiet() -> Iterator[None]:
    """Both packages warn about their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Output(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


class _Session(nn.Module):
    """An ONNX model, run on as many threads as torch was given when it was made."""

    def __init__(self, model: bytes) -> None:
        super().__init__()
        self.session = cpu_session(model, torch.get_num_threads())

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


def _beside(dense: Layers) -> dict[str, Any]:
    """The tensors that belong to no recurrent layer."""
    names = [f"{layer.name}." if layer.name else "" for layer, _ in dense.items]
    return {n: t for n, t in dense.checkpoint.tensors.items() if not any(n.startswith(name) for name in names)}


def _file_bytes(state: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the file that torch.save writes, and of the tensors in it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        tensors = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    return buffer.getbuffer().nbytes, tensors


def _refused(error: Exception) -> UnsupportedError:
    what = error.what if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
    return UnsupportedError(" ".join(what.split())[:200])
