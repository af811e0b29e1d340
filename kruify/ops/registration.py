"""How an operator `torch.ops.kruify.*` is registered. Its kernels are told in csrc/README.md.

A Kronecker matrix W (gates * rows, cols) reaches an operator as `stages, diagonal, residual, residual_index, bias,
layout`: the merged factors of all terms in one flat list, each (gates of its term, rank, P, Q), the entries of the
sparse residual, and the static `Layout` that says what belongs to what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MATRIX = "Tensor[] stages, Tensor? diagonal, Tensor? residual, Tensor? residual_index, Tensor? bias, int[] layout"
WEIGHTS = MATRIX.replace("Tensor? bias, ", "")
PRECISION = "int precision=0"  # of the products: ops/precision.py

_torch: Any = torch  # torch.library and torch._check carry no types
_definitions = _torch.library.Library("kruify", "DEF")


def define(
    name: str,
    schema: str,
    fallback: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Defines an operator.

    Args:
        fallback: its torch implementation, for every device that has no compiled kernel. Backward passes need none:
            there the derivatives are those of the reference (functions.needs_reference).
        fake: what it returns for tensors without data, where the fallback is too much work for that.
        autograd: the implementation with derivatives. Any such costs every call a round trip through Python, so that
            the operator is there a second time without it, as `{name}_forward`.
    """
    for variant in (name, f"{name}_forward") if autograd else (name,):
        _definitions.define(variant + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if fallback is not None:
            _definitions.impl(variant, fallback, "CompositeExplicitAutograd")
        if fake or fallback:
            _torch.library.register_fake(f"kruify::{variant}")(fake or fallback)
    if autograd is not None:
        _definitions.impl(name, autograd, "Autograd")


define("instruction_set", "() -> int")
define("template_fits", "(int gates, int rank, int rows1, int rows2, bool training, int precision, int device) -> bool")
# sizes: hidden, gates, sets, rank, and of what stands beside pair, rows1, rows2, blocks, block.
define("low_rank_fits", "(int[] sizes, int batch, int precision, int device) -> bool")
define("low_rank_pays", "(int[] sizes, int batch, bool training, bool kept, int precision, int device) -> bool")


def check(condition: bool, message: str) -> None:
    """Refuses arguments of a fake kernel."""
    _torch._check(condition, lambda: message)


def empty_grads(*tensors: Tensor | None) -> list[Tensor]:
    """Gradients without data for the tensors that there are."""
    return [t.new_empty(t.shape) for t in tensors if t is not None]
