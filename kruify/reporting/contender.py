"""The dense network in eight bits by torch's dynamic quantisation, which takes one line and no training: the contender
that a converted network has to beat."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from kruify.analysis.layers import Layers
from kruify.conversion.network import load_network
from kruify.errors import UnsupportedError
from kruify.layers.timing import STEPS
from kruify.reporting.details import peak_memory
from kruify.tasks.base import Task, measure

QUANTISED = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.Linear}  # torch has no eight-bit nn.RNN
_SCALE = 16  # bytes of a matrix's scale and zero point


class Int8Layers(Layers):
    """The recurrent layers of a dense checkpoint, quantised by torch."""

    def modules(self) -> list[nn.Module]:
        return [dynamic_int8(module) for module in super().modules()]


@dataclass(frozen=True)
class Contender:
    """What was measured of the dense network in eight bits.

    Attributes:
        saved: bytes of weights less than in the dense network: of its Linear and recurrent layers where the task builds
            the network, of the recurrent layers alone where there is no task.
    """

    layers: Int8Layers
    metrics: dict[str, float]
    peak_memory_bytes: dict[int, int]
    saved: int


def contender(dense: Layers, task: Task | None, split: str) -> Contender:
    """Quantises a dense network and evaluates it.

    Raises:
        UnsupportedError: torch cannot quantise or run it.
    """
    layers = Int8Layers(dense.checkpoint, dense.items, dense.planned)
    try:
        network = nn.ModuleList(dense.modules()) if task is None else load_network(dense.checkpoint, task)
        metrics = {} if task is None else measure(task, dynamic_int8(network), split)
        return Contender(layers, metrics, peak_memory(layers, STEPS), _saved(network))
    except Exception as error:  # a task may do with its network what a quantised one does not know
        what = error.what if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
        raise UnsupportedError(" ".join(what.split())[:200]) from error


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


def _saved(network: nn.Module) -> int:
    matrices = [
        p for m in network.modules() if type(m) in QUANTISED for p in m.parameters(recurse=False) if p.dim() > 1
    ]
    return sum(p.numel() * (p.element_size() - 1) - _SCALE for p in matrices)
