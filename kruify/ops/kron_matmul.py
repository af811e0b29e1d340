"""`kron_matmul`: the product of a sum of Kronecker products with vectors, W never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kruify.ops import reference
from kruify.ops.functions import (
    Assembly,
    Optional,
    matrix_gradients,
    needs_reference,
    reference_gradients,
    traced,
    unmerged,
)
from kruify.ops.registration import MATRIX, PRECISION, define, empty_grads

_ops = torch.ops.kruify


def _product(x: Tensor, *matrix_and_precision: Any) -> Tensor:
    return reference.kron_matmul(x, *matrix_and_precision[:6])


def _backward_fake(grad: Tensor, x: Tensor, *matrix_and_precision: Any) -> tuple[Tensor, list[Tensor]]:
    stages, diagonal, residual, _, bias = matrix_and_precision[:5]
    return x.new_empty(x.shape), empty_grads(*stages, diagonal, residual, bias)


def _autograd(x: Tensor, stages: list[Tensor], *rest: Any) -> Tensor:
    *parts, bias, layout = rest[:5]
    precision = rest[5] if len(rest) > 5 else 0
    if torch.is_grad_enabled():
        found: Tensor = _node(unmerged(layout), precision, x, bias, *parts, *stages)
        return found
    return _forward(unmerged(layout), precision, x, bias, *parts, *stages)[0]


def multiply(
    assembly: Assembly,
    precision: int,
    x: Tensor,  # (..., cols)
    bias: Optional,  # (gates * rows,)
    rest: tuple[Optional, ...],  # diagonal, residual, residual_index
    parameters: Sequence[Tensor],
) -> Tensor:  # (..., gates * rows)
    """x @ W.T + bias, differentiable; W is what the assembly makes of the parameters."""
    if traced():
        stages = assembly.reference_stages(parameters)
        product: Tensor = _ops.kron_matmul(x, stages, *rest, bias, assembly.layout, precision)
        return product
    if torch.is_grad_enabled():
        found: Tensor = _node(assembly, precision, x, bias, *rest, *parameters)
        return found
    return _forward(assembly, precision, x, bias, *rest, *parameters)[0]


def _forward(assembly: Assembly, precision: int, *tensors: Any) -> tuple[Tensor, list[Tensor]]:  # product, stages
    x, bias, *rest = tensors[:5]
    stages = assembly.stages(tensors[5:])
    return _ops.kron_matmul_forward.default(x, stages, *rest, bias, assembly.layout, precision), stages


class _KronMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, precision: int, *tensors: Any) -> Tensor:
        product, stages = _forward(assembly, precision, *tensors)
        ctx.call, ctx.count = (assembly, precision), len(tensors)
        ctx.save_for_backward(*tensors, *stages)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (assembly, precision), saved, count = ctx.call, ctx.saved_tensors, ctx.count
        if needs_reference(grads):

            def function(first: list[Any], matrix: Any) -> list[Tensor]:
                return [reference.kron_matmul(first[0], bias=first[1], **matrix)]

            return None, None, *reference_gradients(assembly, function, saved[:count], 2, grads)
        x, bias, diagonal, residual, index, *parameters = saved[:count]
        grad_x, found = _ops.kron_matmul_backward.default(
            grads[0], x, list(saved[count:]), diagonal, residual, index, bias, assembly.layout, precision
        )
        grad_bias = None if bias is None else found.pop()
        return None, None, grad_x, grad_bias, *matrix_gradients(assembly, found, diagonal, residual, parameters)


_node: Any = _KronMatmul.apply  # torch does not type it

define("kron_matmul", f"(Tensor x, {MATRIX}, {PRECISION}) -> Tensor", _product, autograd=_autograd)
define(
    "kron_matmul_backward",
    f"(Tensor grad, Tensor x, {MATRIX}, {PRECISION}) -> (Tensor, Tensor[])",
    fake=_backward_fake,
)
