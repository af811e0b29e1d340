"""`dense`: the weight that factors, diagonal and sparse residual stand for, formed faster than a check of anything kept
from the call before would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kruify.ops import reference
from kruify.ops.functions import Assembly, Optional, matrix_gradients, needs_reference, reference_gradients, traced
from kruify.ops.registration import WEIGHTS, define

_ops = torch.ops.kruify


def _dense(*weights: Any) -> Tensor:
    return reference.dense(*weights).contiguous()


define("dense", f"({WEIGHTS}) -> Tensor", _dense)
define("dense_backward", f"(Tensor grad, {WEIGHTS}) -> Tensor[]")


def form_dense(
    assembly: Assembly,
    rest: tuple[Optional, Optional, Optional],  # diagonal, residual, residual_index
    parameters: Sequence[Tensor],
) -> Tensor:  # (gates * rows, cols)
    """The dense weight, differentiable."""
    if traced():
        return reference.dense(assembly.reference_stages(parameters), *rest, layout=assembly.layout)
    if torch.is_grad_enabled():
        found: Tensor = _Dense.apply(assembly, *rest, *parameters)  # type: ignore[no-untyped-call]
        return found
    formed: Tensor = _ops.dense.default(assembly.stages(parameters), *rest, assembly.layout)
    return formed


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, *tensors: Any) -> Tensor:
        stages = assembly.stages(tensors[3:])
        ctx.assembly, ctx.count = assembly, len(tensors)
        ctx.save_for_backward(*tensors, *stages)
        found: Tensor = _ops.dense.default(stages, *tensors[:3], assembly.layout)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assembly, saved, count = ctx.assembly, ctx.saved_tensors, ctx.count
        if needs_reference(grads):

            def function(first: list[Any], matrix: Any) -> list[Tensor]:
                return [reference.dense(**matrix)]

            return None, *reference_gradients(assembly, function, saved[:count], 0, grads)
        diagonal, residual, index, *parameters = saved[:count]
        found = _ops.dense_backward.default(grads[0], list(saved[count:]), diagonal, residual, index, assembly.layout)
        return None, *matrix_gradients(assembly, found, diagonal, residual, parameters)
