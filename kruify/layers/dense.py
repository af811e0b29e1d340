"""The dense path: W is formed once a call, then torch's own kernel runs the sequence. Differentiable in the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import _VF, Tensor

from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.relabel import Relabel, relabel_of
from kruify.layers.steps import State

if TYPE_CHECKING:
    from kruify.layers.base import KRUBase


def run_padded(layer: KRUBase, x: Tensor, state: State) -> tuple[Tensor, State]:
    """(time, batch, features) through torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu."""
    flat = flat_weights(layer)
    hx = list(state) if layer.kind == "lstm" else state[0]
    result = _function(layer)(
        x, hx, flat, layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional, False
    )
    return result[0], tuple(result[1:])


def run_packed(layer: KRUBase, data: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
    """Packed data (sum of batch_sizes, features) through the same functions."""
    flat = flat_weights(layer)
    hx = list(state) if layer.kind == "lstm" else state[0]
    result = _function(layer)(
        data, batch_sizes, hx, flat, layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional
    )
    return result[0], tuple(result[1:])


def flat_weights(layer: KRUBase) -> list[Tensor]:
    """Dense weights in the order that torch's functions expect."""
    flat: list[Tensor] = []
    for k, d in layer.directions():
        relabel = relabel_of(layer, f"_l{k}_reverse" if d else f"_l{k}") if layer.relabelled else None
        for stem, weight in layer.weights(k, d).items():
            if isinstance(weight, KroneckerMatrix):
                flat.append(_densified(weight, stem, relabel))
            elif weight is not None:
                flat.append(weight if relabel is None else relabel.weight_outside(stem, weight))
    return flat


def _densified(matrix: KroneckerMatrix, stem: str, relabel: Relabel | None) -> Tensor:
    """The dense weight in the outside's units; without derivatives it is kept until the matrix changes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(matrix.device.type):
        # torch's fused optimisers change parameters without counting a version: what was kept before a step of training
        # is not to be trusted after it.
        matrix.__dict__.pop("_dense_kept", None)
        return _outside(matrix, stem, relabel)
    numbers = [*matrix.parameters(), *matrix.buffers(), *(() if relabel is None else relabel.buffers())]
    key = [(t.data_ptr(), t._version, t.dtype) for t in numbers]
    kept: _Kept | None = matrix.__dict__.get("_dense_kept")
    if kept is None or kept.key != key:
        kept = matrix.__dict__["_dense_kept"] = _Kept(key, _outside(matrix, stem, relabel))
    return kept.dense


def _outside(matrix: KroneckerMatrix, stem: str, relabel: Relabel | None) -> Tensor:
    return matrix.to_dense() if relabel is None else relabel.weight_outside(stem, matrix.to_dense())


class _Kept:
    """A dense weight and the state of the parameters that it was made from; copies and pickles leave it out."""

    def __init__(self, key: list[tuple[int, int, torch.dtype]], dense: Tensor) -> None:
        self.key, self.dense = key, dense

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _function(layer: KRUBase):  # type: ignore[no-untyped-def]  # torch does not type these
    if layer.kind == "rnn":
        return _VF.rnn_relu if layer.nonlinearity == "relu" else _VF.rnn_tanh
    return {"lstm": _VF.lstm, "gru": _VF.gru}[layer.kind]
