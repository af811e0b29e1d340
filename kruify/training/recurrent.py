"""What the recurrent layers of a network take in and give out while it runs, recorded by forward hooks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase

RECURRENT = (nn.RNNBase, nn.RNNCellBase, KRUBase, KRUCellBase)


@dataclass(frozen=True)
class Call:
    """One forward call of a layer.

    Attributes:
        outputs: every tensor that it gave: the output sequence (packed: its data), then the final h (and c) of all
            layers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]


def recurrent_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> recurrent layer or cell, dense or converted."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RECURRENT)}


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors in what a recurrent layer returns, in order; of a PackedSequence its data."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    return [tensor for part in outputs for tensor in tensors_of(part)] if isinstance(outputs, tuple | list) else []


@contextmanager
def recorded(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, list[Call]]]:
    """Inside the block the calls of the layers `names` are recorded, in order, under their names."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    handles = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            calls[name].append(Call(args, kwargs, tensors_of(outputs)))

        return hook

    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(record(name), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
