"""The custom operators `torch.ops.kruify.*` and what is known about the library behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kruify.ops import operators as operators  # registers them
from kruify.ops.layout import Layout, TermLayout
from kruify.ops.library import backend_info, has_kernel
from kruify.ops.stages import plan

_forward = torch.ops.kruify.kron_product_forward.default  # an overload is called sooner than its name
_backward = torch.ops.kruify.kron_product_backward.default

__all__ = ["Layout", "TermLayout", "backend_info", "has_kernel", "kron_matmul"]


def kron_matmul(
    x: Tensor,  # (..., product of the Q_f)
    factors: Sequence[Tensor],  # each (P_f, Q_f)
) -> Tensor:  # (..., product of the P_f)
    """x @ (F_0 (x) F_1 (x) ...).T without forming the product; differentiable in x and every factor."""
    groups = _groups(tuple([f.shape for f in factors]))  # a list: a generator takes twice as long
    result: Tensor
    if not torch.is_grad_enabled():
        result = _forward(x, list(factors), groups)
    elif torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        result = torch.ops.kruify.kron_product(x, list(factors), groups)
    else:
        result = _Product.apply(x, groups, *factors)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """kruify::kron_product with less Python around it than torch.library puts there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[int, ...], *factors: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(x, *factors)
        result: Tensor = _forward(x, list(factors), groups)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            grad_x, found, _ = operators.kron_product_derivative(ctx, grads[0])
        else:
            x, *factors = ctx.saved_tensors
            grad_x, found = _backward(grads[0], x, factors, ctx.groups)
        return grad_x, None, *found


@lru_cache(maxsize=1024)
def _groups(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    return plan(tuple((p, q) for p, q in shapes), 1, keep_order=True).groups
