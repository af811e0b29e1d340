"""The torch backend: W is formed once per call, then torch's own kernel runs the sequence. Differentiable in the
factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor

from kruify.layers import kernel
from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.matrix import KroneckerMatrix
from kruify.ops import has_kernel, onednn
from kruify.ops.dense import form_dense
from kruify.ops.functions import traced
from kruify.ops.reference import State

if TYPE_CHECKING:
    from kruify.layers.recurrent import RecurrentLayer


class TorchBackend:
    """See the module."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        if input.rectangular and uses_fused_autograd(layer, input.data):
            output, final = run_each_direction(layer, input.padded(), state, run_direction)
            # The node keeps its own, and a user may change these in place, as torch.nn's.
            return output.clone() if layer.num_directions == 1 else output, tuple(s.clone() for s in final)
        padded = (input.padded(),) if input.rectangular else (input.data, input.batch_sizes)
        hx = list(state) if layer.kind == "lstm" else state[0]
        options: tuple[Any, ...] = (layer.bias, layer.num_layers, layer.dropout, layer.training)
        options = (*options, layer.num_directions == 2, *((False,) if input.rectangular else ()))  # batch_first
        output, *final = _function(layer, input.data)(*padded, hx, flat_weights(layer), *options)
        return output, tuple(final)


def uses_fused_autograd(layer: RecurrentLayer, x: Tensor) -> bool:
    """Whether `run_direction` serves: torch's LSTM kernel with derivatives, W formed and the kernel run in one node of
    the graph, with less around it than torch.lstm has."""
    if layer.kind != "lstm" or not layer.bias or not torch.is_grad_enabled() or traced():
        return False
    if x.dtype != torch.float32 or x.is_cuda or torch.is_autocast_enabled("cpu"):
        return False
    return (
        has_kernel("cpu") and onednn.available() and all(_served(layer.weights(k, d), x) for k, d in layer.directions())
    )


def _served(weights: Weights, x: Tensor) -> bool:
    """A Kronecker recurrent matrix, no projection, all else plain tensors, of one dtype on one device."""
    matrix, others = weights["weight_hh"], [weights[name] for name in ("weight_ih", "bias_ih", "bias_hh")]
    return (
        isinstance(matrix, KroneckerMatrix)
        and weights["weight_hr"] is None
        and matrix.dtype == x.dtype
        and all(isinstance(t, Tensor) and t.dtype == x.dtype and t.device == x.device for t in others)
    )


def run_direction(
    weights: Weights,
    x: Tensor,  # (time, batch, features)
    state: State,  # h, c (batch, size)
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer and direction of an LSTM, padded."""
    matrix = weights["weight_hh"]
    assert isinstance(matrix, KroneckerMatrix)
    first: Any = (x, weights["weight_ih"], weights["bias_ih"], weights["bias_hh"], *state)
    form = kernel.form_of(matrix)
    parameters = kernel.parameters_of(matrix, form)
    out, h, c = onednn.lstm(form.assembly, reverse, first, matrix.parts_beside_terms(), parameters)
    return out, (h, c)


def flat_weights(layer: RecurrentLayer) -> list[Tensor]:
    """Dense weights in the order that torch's functions expect."""
    weights = (weight for k, d in layer.directions() for weight in layer.weights(k, d).values())
    return [_formed(w) if isinstance(w, KroneckerMatrix) else w for w in weights if w is not None]


def _formed(matrix: KroneckerMatrix) -> Tensor:
    """The dense weight, by the compiled operator where there is one."""
    device = matrix.device.type
    if device == "cpu" and has_kernel(device) and matrix.dtype in (torch.float32, torch.float64):
        form = kernel.form_of(matrix)
        return form_dense(form.assembly, matrix.parts_beside_terms(), kernel.parameters_of(matrix, form))
    return matrix.to_dense()


def breaks_the_graph(layer: RecurrentLayer, x: Tensor) -> bool:
    """Whether torch.compile leaves torch's own layer out of its graph: oneDNN's LSTM cannot be traced in training."""
    return layer.kind == "lstm" and not x.is_cuda and torch.is_grad_enabled()


def _function(layer: RecurrentLayer, x: Tensor) -> Any:  # torch does not type these
    if layer.kind == "lstm" and torch.compiler.is_compiling() and breaks_the_graph(layer, x):
        from kruify.layers import untraced

        return untraced.lstm
    return getattr(_VF, layer.kernel_kind)
