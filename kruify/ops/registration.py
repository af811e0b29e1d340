"""How an operator `torch.ops.kruify.*` is registered. Its kernels are told in csrc/README.md.

A Kronecker matrix W (gates * rows, cols) reaches an operator as `stages, diagonal, residual, residual_index, bias,
layout`: the merged factors of all terms in one flat list, each (gates of its term, rank, P, Q), the entries of the
sparse residual, and the static `Layout` that says what belongs to what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        fallback: its torch implementation, for every device that has no compiled kernel.
        fake: what it returns for tensors without data.
        autograd: the implementation with derivatives. Any such costs every call a round trip through Python, so that
            the operator is there a second time without it, as `{name}_forward`.
    """
    for variant in (name, f"{name}_forward") if autograd else (name,):
        _definitions.define(variant + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if fallback is not None:
            _definitions.impl(variant, fallback, "CompositeExplicitAutograd")
        if fake is not None:
            _torch.library.register_fake(f"kruify::{variant}")(fake)
    if autograd is not None:
        _definitions.impl(name, autograd, "Autograd")


define("instruction_set", "() -> int")
define("template_fits", "(int gates, int rank, int rows1, int rows2, bool training, int precision, int device) -> bool")


def check(condition: bool, message: str) -> None:
    """Refuses arguments of a fake kernel."""
    _torch._check(condition, lambda: message)


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def empty_grads(*tensors: Tensor | None) -> list[Tensor]:
    """Gradients without data for the tensors that there are."""
    return [t.new_empty(t.shape) for t in present(*tensors)]


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Derivatives inside an operator's implementation, where the dispatcher has switched them off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(torch._C._parse_dispatch_key(key) or key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield


def gradients(
    function: Callable[[list[Any]], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of a differentiable function, one per input; None for those that are None or hold integers.

    Args:
        function: of the list of inputs, gives outputs in the order of `grads`.
        create_graph: whether the gradients can be differentiated again, in the inputs and in `grads`.
    """
    with torch.enable_grad():
        if not create_graph:
            inputs = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in inputs]
        outputs = function(list(inputs))
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found: Iterator[Tensor] = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            if pairs
            else [torch.zeros_like(t) for t in wanted]
        )
        return [
            next(found) if t is not None and t.requires_grad else None if t is None or not t.is_floating_point()
            else torch.zeros_like(t)
            for t in inputs
        ]  # fmt: skip
