"""The dense path: W is formed once a call, then torch's own kernel runs the sequence. Differentiable in the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor

from kruify.layers import kernel
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.steps import State
from kruify.ops import functions, has_kernel, onednn

if TYPE_CHECKING:
    from kruify.layers.base import KRUBase


def run_padded(layer: KRUBase, x: Tensor, state: State) -> tuple[Tensor, State]:
    """(time, batch, features) through torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu."""
    flat = flat_weights(layer)
    hx = list(state) if layer.kind == "lstm" else state[0]
    result = _function(layer, x)(
        x, hx, flat, layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional, False
    )
    return result[0], tuple(result[1:])


def run_packed(layer: KRUBase, data: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
    """Packed data (sum of batch_sizes, features) through the same functions."""
    flat = flat_weights(layer)
    hx = list(state) if layer.kind == "lstm" else state[0]
    result = _function(layer, data)(
        data, batch_sizes, hx, flat, layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional
    )
    return result[0], tuple(result[1:])


def in_one_node(layer: KRUBase, x: Tensor) -> bool:
    """Whether `run_direction` serves: torch's LSTM kernel with derivatives, and less around it than torch.lstm has."""
    if not (layer.kind == "lstm" and layer.bias and torch.is_grad_enabled() and functions.lean("cpu")):
        return False
    if x.dtype != torch.float32 or x.is_cuda or layer.proj_size or not (has_kernel("cpu") and onednn.available()):
        return False
    return all(_plain_around(layer.weights(k, d), x) for k, d in layer.directions())


def _plain_around(weights: kernel.Weights, x: Tensor) -> bool:
    """A Kronecker recurrent matrix, all else plain tensors, of one dtype on one device."""
    matrix, others = weights["weight_hh"], [weights[name] for name in ("weight_ih", "bias_ih", "bias_hh")]
    return (
        isinstance(matrix, KroneckerMatrix)
        and matrix.dtype == x.dtype
        and all(isinstance(t, Tensor) and t.dtype == x.dtype and t.device == x.device for t in others)
    )


def run_direction(
    weights: kernel.Weights,
    x: Tensor,  # (time, batch, features)
    state: State,  # h, c (batch, size)
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer and direction of an LSTM, padded."""
    matrix = weights["weight_hh"]
    assert isinstance(matrix, KroneckerMatrix)
    first = (x, weights["weight_ih"], weights["bias_ih"], weights["bias_hh"], *state)
    form, rest = kernel.form_of(matrix), (matrix.diagonal, *kernel.overlay_of(matrix))
    out, h, c = onednn.lstm(form.assembly, reverse, first, rest, kernel.parameters_of(matrix, form))  # type: ignore[arg-type]
    return out, (h, c)


def flat_weights(layer: KRUBase) -> list[Tensor]:
    """Dense weights in the order that torch's functions expect."""
    flat: list[Tensor] = []
    for k, d in layer.directions():
        for weight in layer.weights(k, d).values():
            if weight is not None:
                flat.append(_formed(weight) if isinstance(weight, KroneckerMatrix) else weight)
    return flat


def _formed(matrix: KroneckerMatrix) -> Tensor:
    """The dense weight, by the compiled operator where there is one: it forms W faster than anything could be checked
    that was kept from the call before."""
    device = matrix.device.type
    compiled = device == "cpu" and has_kernel(device) and matrix.dtype in (torch.float32, torch.float64)
    if not compiled or not functions.lean(device):
        return matrix.to_dense()
    form, rest = kernel.form_of(matrix), (matrix.diagonal, *kernel.overlay_of(matrix))
    parameters = kernel.parameters_of(matrix, form)
    if torch.is_grad_enabled():
        return functions.dense(form.assembly, rest, parameters)
    stages = form.assembly.stages(parameters)
    formed: Tensor = torch.ops.kruify.dense_forward(stages, *rest, form.layout)
    return formed


def breaks_the_graph(layer: KRUBase, x: Tensor) -> bool:
    """Whether torch.compile leaves torch's own layer out of its graph: oneDNN's LSTM cannot be traced in training."""
    return layer.kind == "lstm" and not x.is_cuda and torch.is_grad_enabled()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_lstm(*arguments: Any) -> Any:
    return _VF.lstm(*arguments)


def _function(layer: KRUBase, x: Tensor):  # type: ignore[no-untyped-def]  # torch does not type these
    if layer.kind == "rnn":
        return _VF.rnn_relu if layer.nonlinearity == "relu" else _VF.rnn_tanh
    if torch.compiler.is_compiling() and breaks_the_graph(layer, x):
        return _untraced_lstm
    return {"lstm": _VF.lstm, "gru": _VF.gru}[layer.kind]
