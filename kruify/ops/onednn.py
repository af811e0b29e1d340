"""torch's own LSTM kernel on a weight formed from factors, with derivatives, in one node of the graph.

torch.lstm calls the same kernel; what it puts around it, and a second node that forms W, take longer than a short
sequence does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kruify.ops import reference
from kruify.ops.functions import Assembly, Optional, matrix_gradients, needs_reference, reference_gradients

_ops: Any = torch.ops.kruify
_SCHEMAS = {  # as torch 2.10 to 2.13 have them
    "mkldnn_rnn_layer": "(Tensor input, Tensor weight0, Tensor weight1, Tensor weight2, Tensor weight3, Tensor hx_,"
    " Tensor cx_, bool reverse, int[] batch_sizes, int mode, int hidden_size, int num_layers, bool has_biases,"
    " bool bidirectional, bool batch_first, bool train) -> (Tensor, Tensor, Tensor, Tensor)",
    "mkldnn_rnn_layer_backward": "(Tensor input, Tensor weight1, Tensor weight2, Tensor weight3, Tensor weight4,"
    " Tensor hx_, Tensor cx_tmp, Tensor output, Tensor hy_, Tensor cy_, Tensor? grad_output, Tensor? grad_hy,"
    " Tensor? grad_cy, bool reverse, int mode, int hidden_size, int num_layers, bool has_biases, bool train,"
    " bool bidirectional, int[] batch_sizes, bool batch_first, Tensor workspace)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}
_LSTM = 2  # torch's number for the kind


def available() -> bool:
    """Whether torch has the kernel, under the schema known here, and may use it."""
    return _known() and bool(torch.backends.mkldnn.enabled)


@cache
def _known() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    found = (getattr(torch.ops.aten, name, None) for name in _SCHEMAS)
    return all(
        operator is not None and str(operator.default._schema) == f"aten::{name}{schema}"
        for operator, (name, schema) in zip(found, _SCHEMAS.items(), strict=True)
    )


def lstm(
    assembly: Assembly,
    reverse: bool,
    first: tuple[Tensor, ...],  # x (steps, batch, features), w_ih, bias_ih, bias_hh, h0, c0 (batch, H): float32, CPU
    rest: tuple[Optional, ...],  # diagonal, residual, residual_index
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # out (steps, batch, H), hT, cT
    """One layer in one direction; W is what the assembly makes of the parameters."""
    found: tuple[Tensor, Tensor, Tensor] = _Lstm.apply(assembly, reverse, *first, *rest, *parameters)  # type: ignore[no-untyped-call]
    return found


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, reverse: bool, *tensors: Any) -> Any:
        x, w_ih, bias_ih, bias_hh, h0, c0, diagonal, residual, index, *parameters = tensors
        stages = assembly.stages(parameters)
        dense = _ops.dense.default(stages, diagonal, residual, index, assembly.layout)
        x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
        # The kernel keeps what its backward pass needs where gradients are enabled.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            out, h, c, workspace = torch.ops.aten.mkldnn_rnn_layer.default(
                x, w_ih, dense, bias_ih, bias_hh, h0, c0, reverse, [], _LSTM, h0.shape[1], 1, True, False, False, True
            )
        ctx.set_materialize_grads(False)
        ctx.call, ctx.count = (assembly, reverse), len(tensors)
        ctx.save_for_backward(*tensors, out, h, c, workspace, dense, *stages)
        return out, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assembly, reverse = ctx.call
        saved, count = ctx.saved_tensors, ctx.count
        x, w_ih, bias_ih, bias_hh, h0, c0, diagonal, residual, index, *parameters = saved[:count]
        if needs_reference(grads):

            def function(first: list[Any], matrix: Any) -> Any:
                x, w_ih, bias_ih, bias_hh, h0, c0 = first
                steps, batch = x.shape[:2]
                data, sizes = x.reshape(steps * batch, -1), torch.full((steps,), batch, device="cpu")
                given: Any = {"bias": bias_hh, "kind": "lstm", "reverse": reverse, **matrix}
                out, h, c, _ = reference.recurrence(data, w_ih, bias_ih, sizes, h0, c0, **given)
                return out.view(steps, batch, -1), h, c

            return None, None, *reference_gradients(assembly, function, saved[:count], 6, grads)
        out, h, c, workspace, dense, *stages = saved[count:]
        grad_x, grad_w, grad_dense, grad_ih, grad_hh, grad_h0, grad_c0 = (
            torch.ops.aten.mkldnn_rnn_layer_backward.default(
                x.contiguous(), w_ih, dense, bias_ih, bias_hh, h0.contiguous(), c0.contiguous(), out, h, c, *grads,
                reverse, _LSTM, h0.shape[1], 1, True, True, False, [], False, workspace,
            )
        )  # fmt: skip
        found = _ops.dense_backward.default(grad_dense, stages, diagonal, residual, index, assembly.layout)
        first = (grad_x, grad_w, grad_ih, grad_hh, grad_h0, grad_c0)
        return None, None, *first, *matrix_gradients(assembly, found, diagonal, residual, parameters)
