"""The custom operators `torch.ops.kruify.*` and what is known about the library behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kruify.ops import operators as operators  # registers them
from kruify.ops.layout import Layout, TermLayout
from kruify.ops.library import backend_info, has_kernel
from kruify.ops.stages import plan

__all__ = ["Layout", "TermLayout", "backend_info", "has_kernel", "kron_matmul"]


def kron_matmul(
    x: Tensor,  # (..., product of the Q_f)
    factors: Sequence[Tensor],  # each (P_f, Q_f)
) -> Tensor:  # (..., product of the P_f)
    """x @ (F_0 (x) F_1 (x) ...).T without forming the product; differentiable in x and every factor."""
    groups = _groups(tuple(f.shape for f in factors))
    operator = torch.ops.kruify.kron_product if torch.is_grad_enabled() else torch.ops.kruify.kron_product_forward
    result: Tensor = operator(x, list(factors), groups)
    return result


@lru_cache(maxsize=1024)
def _groups(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    return plan(tuple((p, q) for p, q in shapes), 1, keep_order=True).groups
