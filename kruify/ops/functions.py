"""Derivatives of the operators with less Python around them than torch.library puts there: its trees of arguments take
longer than a short sequence. Under torch.compile, torch.func and autocast the operators themselves serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kruify.ops import operators

_MATRIX = 11  # gradients up to that of the bias, as the derivative of the operator orders them


def lean(device_type: str) -> bool:
    """Whether a call with derivatives may go past the dispatcher's autograd."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(device_type)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def recurrence(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.kruify.recurrence with training=True: its arguments up to `reverse` and `precision` -> out, hT, cT."""
    stages = arguments[6]
    found: tuple[Tensor, Tensor, Tensor] = _Recurrence.apply(*arguments[:6], *arguments[7:], *stages)  # type: ignore[no-untyped-call]
    return found


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        first, (*matrix, kind, reverse, precision), stages = inputs[:6], inputs[6:14], list(inputs[14:])
        call = (*first, stages, *matrix, kind, reverse, True, precision)
        output = torch.ops.kruify.recurrence_forward.default(*call)
        operators.recurrence_context(ctx, call, output)
        return output[0], output[1], output[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_out, grad_h, grad_c = grads
        found = operators.recurrence_derivative(ctx, grad_out, grad_h, grad_c, None)
        stages, *matrix = found[6:_MATRIX]
        return *found[:6], *matrix, None, None, None, None, *stages


def dense(stages: list[Tensor], *rest: Any) -> Tensor:
    """torch.ops.kruify.dense."""
    found: Tensor = _Dense.apply(*rest, *stages)  # type: ignore[no-untyped-call]
    return found


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        call = (list(inputs[4:]), *inputs[:4])
        operators.dense_context(ctx, call, None)
        found: Tensor = torch.ops.kruify.dense_forward.default(*call)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        stages, *rest = operators.dense_derivative(ctx, grads[0])
        return *rest, *stages
