"""`recurrence`: one layer in one direction over packed sequences, with the input's product in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kruify.errors import UsageError
from kruify.ops import graphs, reference
from kruify.ops.functions import (
    Assembly,
    Optional,
    matrix_gradients,
    needs_reference,
    reference_gradients,
    traced,
    training,
    unmerged,
)
from kruify.ops.layout import decode
from kruify.ops.registration import MATRIX, PRECISION, check, define, empty_grads

_ops = torch.ops.kruify
_STATE = "Tensor batch_sizes, Tensor h0, Tensor? c0"
_GRADS = "Tensor? grad_out, Tensor? grad_hT, Tensor? grad_cT"


def run_recurrence(
    assembly: Assembly,
    kind: str,  # a key of reference.GATES
    reverse: bool,
    precision: int,
    first: tuple[Optional, ...],  # x, w_ih, bias_ih, batch_sizes, h0, c0 as reference.recurrence has them
    bias: Optional,
    rest: tuple[Optional, Optional, Optional],  # diagonal, residual, residual_index
    parameters: Sequence[Tensor],
    kept: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # out (S, H), hT (B, H), cT (B, H), empty but for an LSTM
    """The recurrence, differentiable; W is what the assembly makes of the parameters. `kept`: a CUDA graph may keep its
    launches (graphs.py)."""
    if traced():
        wanted, stages, layout = training(), assembly.reference_stages(parameters), assembly.layout
        if assembly.whole is not None:
            stages, rest = [_as_stage(reference.dense(stages, *rest, layout=layout), layout)], (None, None, None)
            layout = assembly.whole
        operator = _ops.recurrence if wanted else _ops.recurrence_forward
        out, h, c, _ = operator(*first, stages, *rest, bias, layout, kind, reverse, wanted, precision)
        return out, h, c
    if torch.is_grad_enabled():
        out, h, c, _ = _node(assembly, kind, reverse, precision, *first, bias, *rest, *parameters)
        return out, h, c
    matrix, _ = _prepare(assembly, bias, rest, parameters)
    run = graphs.recurrence if kept else _ops.recurrence_forward.default
    out, h, c, _ = run(*first, *matrix, kind, reverse, False, precision)
    return out, h, c


def _prepare(
    assembly: Assembly, bias: Optional, rest: Sequence[Optional], parameters: Sequence[Tensor]
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The matrix as the operator takes it, and what a backward pass needs of it: W if it was formed, the stages."""
    stages = assembly.stages(parameters)
    if assembly.whole is None:
        return (stages, *rest, bias, assembly.layout), stages
    dense = _as_stage(_ops.dense.default(stages, *rest, assembly.layout), assembly.layout)
    return ([dense], None, None, None, bias, assembly.whole), [dense, *stages]


def _as_stage(dense: Tensor, layout: Sequence[int]) -> Tensor:
    gates, rows, cols = layout[:3]
    return dense.view(gates, 1, rows, cols)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, kind: str, reverse: bool, precision: int, *tensors: Any) -> Any:
        matrix, kept = _prepare(assembly, tensors[6], tensors[7:10], tensors[10:])
        out, h, c, workspace = _ops.recurrence_forward.default(*tensors[:6], *matrix, kind, reverse, True, precision)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(workspace)
        ctx.call, ctx.count = (assembly, kind, reverse, precision), len(tensors)
        ctx.save_for_backward(*tensors, out, workspace, *kept)
        return out, h, c, workspace

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assembly, kind, reverse, precision = ctx.call
        saved, count = ctx.saved_tensors, ctx.count
        x, w_ih, _, sizes, h0, c0, bias, diagonal, residual, index, *parameters = saved[:count]
        grads = grads[:2] if c0 is None else grads[:3]
        if needs_reference(grads):

            def function(first: list[Any], matrix: Any) -> Any:
                x, w_ih, bias_ih, _, h0, c0, bias = first
                found = reference.recurrence(
                    x, w_ih, bias_ih, sizes, h0, c0, bias=bias, kind=kind, reverse=reverse, **matrix
                )
                return found[: len(grads)]

            return None, None, None, None, *reference_gradients(assembly, function, saved[:count], 7, grads)
        out, workspace, *stages = saved[count:]
        weights: tuple[Any, ...] = (stages, diagonal, residual, index, bias, assembly.layout)
        if assembly.whole is not None:
            dense, *stages = stages
            weights = ([dense], None, None, None, bias, assembly.whole)
        grad_out, grad_h, grad_c = (g if g is None or g.is_contiguous() else g.contiguous() for g in (*grads, None)[:3])
        wanted = ctx.needs_input_grad[4:7]
        *of_input, grad_h0, grad_c0, found = _ops.layer_backward.default(
            *(grad_out, grad_h, grad_c, x, w_ih, out, workspace, sizes, h0, c0, *weights),
            *(kind, reverse, *wanted, precision),
        )
        of_input = [g if w else None for g, w in zip(of_input, wanted, strict=True)]
        grad_bias = None if bias is None else found.pop()
        if assembly.whole is not None:
            dense_grad = found[0].view(-1, assembly.layout[2])
            found = _ops.dense_backward.default(dense_grad, stages, diagonal, residual, index, assembly.layout)
        return (
            *(None, None, None, None),
            *(*of_input, None, grad_h0, None if c0 is None else grad_c0, grad_bias),
            *matrix_gradients(assembly, found, diagonal, residual, parameters),
        )


_node: Any = _Recurrence.apply  # torch does not type it


def _autograd(*arguments: Any) -> Any:
    *first, stages, diagonal, residual, index, bias, layout, kind, reverse, trains = arguments[:15]
    precision = arguments[15] if len(arguments) > 15 else 0  # the dispatcher leaves out what equals its default
    tensors = (*first, bias, diagonal, residual, *stages)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return _ops.recurrence_forward(*arguments)
    if not trains:
        raise UsageError("recurrence with training=False has no derivative", hint="Pass training=True")
    return _node(unmerged(layout), kind, reverse, precision, *first, bias, diagonal, residual, index, *stages)


def _recurrence(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h0, trains = arguments[4], arguments[14]
    out, h, c, workspace = reference.recurrence(*arguments[:14])
    kept = workspace if trains else workspace[:0]
    return out.clone(), h.clone(), h0.new_empty(0) if c is None else c.clone(), kept.clone()


def _recurrence_fake(x: Tensor, w_ih: Optional, _: Optional, __: Tensor, h0: Tensor, c0: Optional, *rest: Any) -> Any:
    layout, kind, _, trains = rest[5:9]
    form, width = decode(layout), x.shape[-1] if w_ih is None else w_ih.shape[0]
    check(kind in reference.GATES, f"recurrence: unknown kind '{kind}'")
    check(form.gates == reference.GATES[kind], f"recurrence: {kind} does not have {form.gates} gates")
    check(x.dim() == 2 and h0.dim() == 2, "recurrence: x and h0 must have two dimensions")
    # torch runs this for tensors with and without numbers side by side, too.
    check(x.device == h0.device == rest[0][0].device, "recurrence: tensors of several devices")
    check(width == form.gates * form.rows, f"recurrence: gates of width {width} for {form}")
    check(form.rows == form.cols == h0.shape[1], f"recurrence: a state of {h0.shape[1]} for {form}")
    check((c0 is not None) == (kind == "lstm"), "recurrence: c0 belongs to kind 'lstm' alone")
    columns = reference.WORKSPACE[kind] * form.rows
    c = h0.new_empty(0 if c0 is None else h0.shape)
    workspace = h0.new_empty(x.shape[0] if trains else 0, columns)
    return h0.new_empty(x.shape[0], form.rows), h0.new_empty(h0.shape), c, workspace


def _backward_fake(grad_out: Optional, grad_h: Optional, grad_c: Optional, *rest: Any) -> tuple[Any, ...]:
    out, _, _, h0, c0, stages, diagonal, residual, _, bias, layout = rest[:11]
    form = decode(layout)
    grad_gates = out.new_empty(out.shape[0], form.gates * form.rows)
    grad_c0 = h0.new_empty(0 if c0 is None else h0.shape)
    return grad_gates, h0.new_empty(h0.shape), grad_c0, empty_grads(*stages, diagonal, residual, bias)


def _layer_backward(
    grad_out: Optional, grad_h: Optional, grad_c: Optional, x: Tensor, w_ih: Optional, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *call, needs_x, needs_w, needs_b = rest[:16]
    grad_gates, grad_h0, grad_c0, grads = _ops.recurrence_backward(grad_out, grad_h, grad_c, *call, *rest[16:])
    grad_x, grad_w = grad_gates, grad_gates.new_empty(0)
    if w_ih is not None:
        grad_x = grad_gates @ w_ih if needs_x else x.new_empty(0, x.shape[1])
        grad_w = grad_gates.T @ x if needs_w else w_ih.new_empty(0, w_ih.shape[1])
    grad_b = grad_gates.sum(0) if needs_b else grad_gates.new_empty(0)
    return grad_x, grad_w, grad_b, grad_h0, grad_c0, grads


define(
    "recurrence",
    f"(Tensor x, Tensor? w_ih, Tensor? bias_ih, {_STATE}, {MATRIX}, str kind, bool reverse, bool training, {PRECISION})"
    " -> (Tensor out, Tensor hT, Tensor cT, Tensor workspace)",
    _recurrence,
    _recurrence_fake,
    _autograd,
)
define(
    "recurrence_backward",
    f"({_GRADS}, Tensor out, Tensor workspace, {_STATE}, {MATRIX}, str kind, bool reverse, {PRECISION})"
    " -> (Tensor grad_gates, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_matrix)",
    fake=_backward_fake,
)
define(
    "layer_backward",
    f"({_GRADS}, Tensor x, Tensor? w_ih, Tensor out, Tensor workspace, {_STATE}, {MATRIX}, str kind, bool reverse,"
    f" bool needs_x, bool needs_w_ih, bool needs_bias_ih, {PRECISION})"
    " -> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_bias_ih, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_matrix)",
    _layer_backward,
    _layer_backward,  # every part of it has a fake of its own
)
