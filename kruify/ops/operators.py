"""The operators: schema, fake kernels, derivatives, and the torch fallback of each. Schemas are told in csrc/README.md.

A Kronecker matrix W (gates * rows, cols) reaches an operator as `stages, diagonal, overlay, overlay_index, bias,
layout`: the merged factors of all terms in one flat list, each (gates of its term, rank, P, Q), and the static
`Layout` that says what belongs to what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kruify.errors import UsageError
from kruify.ops import library, reference
from kruify.ops.layout import decode

_MATRIX = "Tensor[] stages, Tensor? diagonal, Tensor? overlay, Tensor? overlay_index, Tensor? bias, int[] layout"
_WEIGHTS = _MATRIX.replace("Tensor? bias, ", "")
_STATE = "Tensor batch_sizes, Tensor h0, Tensor? c0"
_PRECISION = "int precision=0"  # of the products: ops/precision.py

SCHEMAS = {
    "instruction_set": "() -> int",
    "template_fits": "(int gates, int rank, int rows1, int rows2, bool training, int precision, int device) -> bool",
    "merge": "(Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]",
    "merge_backward": "(Tensor[] grads, Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]",
    "kron_matmul": f"(Tensor x, {_MATRIX}, {_PRECISION}) -> Tensor",
    "kron_matmul_backward": f"(Tensor grad, Tensor x, {_MATRIX}, {_PRECISION}) -> (Tensor, Tensor[])",
    "dense": f"({_WEIGHTS}) -> Tensor",
    "dense_backward": f"(Tensor grad, {_WEIGHTS}) -> Tensor[]",
    "recurrence": f"(Tensor x, Tensor? w_ih, Tensor? bias_ih, {_STATE}, {_MATRIX}, str kind,"
    f" bool reverse, bool training, {_PRECISION}) -> (Tensor out, Tensor hT, Tensor cT, Tensor workspace)",
    "recurrence_backward": "(Tensor? grad_out, Tensor? grad_hT, Tensor? grad_cT, Tensor out, Tensor workspace,"
    f" {_STATE}, {_MATRIX}, str kind, bool reverse, {_PRECISION})"
    " -> (Tensor grad_gates, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_matrix)",
    "layer_backward": "(Tensor? grad_out, Tensor? grad_hT, Tensor? grad_cT, Tensor x, Tensor? w_ih, Tensor out,"
    f" Tensor workspace, {_STATE}, {_MATRIX}, str kind, bool reverse, bool needs_x, bool needs_w_ih,"
    f" bool needs_bias_ih, {_PRECISION}) -> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_bias_ih, Tensor grad_h0,"
    " Tensor grad_c0, Tensor[] grad_matrix)",
}

_torch: Any = torch  # torch.library and torch._check carry no types
# The same without derivatives: registering any for an operator costs every call of it a round trip through Python.
_WITHOUT = ("merge", "dense", "kron_matmul", "recurrence")
SCHEMAS |= {f"{name}_forward": SCHEMAS[name] for name in _WITHOUT}

_definitions = _torch.library.Library("kruify", "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
library.load()


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _torch.library.register_fake(name)(function)
        if f"{name}_forward".removeprefix("kruify::") in SCHEMAS:
            _torch.library.register_fake(f"{name}_forward")(function)
        return function

    return register


def _fallback(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a torch implementation for every device that has no compiled kernel."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _definitions.impl(name, function, "CompositeExplicitAutograd")
        if f"{name}_forward" in SCHEMAS:
            _definitions.impl(f"{name}_forward", function, "CompositeExplicitAutograd")
        return function

    return register


@contextmanager
def _autograd() -> Iterator[None]:
    """Derivatives inside an operator's implementation, where the dispatcher has switched them off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(torch._C._parse_dispatch_key(key) or key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield


def _wanted(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def gradients(
    function: Callable[[list[Tensor | None]], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of the reference with respect to every input that is there."""
    if not create_graph:
        inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    pairs = [(o, g) for o, g in zip(function(list(inputs)), grads, strict=True) if o is not None and g is not None]
    pairs = [(o, g) for o, g in pairs if o.requires_grad]
    wanted = _wanted(*inputs)
    differentiable = [t for t in wanted if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in wanted]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            differentiable,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if t.requires_grad else torch.zeros_like(t) for t in wanted]


def _grads_of(stages: Sequence[Tensor], *rest: Tensor | None) -> list[Tensor]:
    """Empty gradients for a matrix in the operators' order: stages, diagonal, overlay, bias (those there are)."""
    return [t.new_empty(t.shape) for t in _wanted(*stages, *rest)]


# merge


@_fallback("merge")
def _merge(factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    return [s.clone() if any(s is f for f in factors) else s for s in reference.merge(factors, scale, groups)]


@_fallback("merge_backward")
def _merge_backward(
    grads: list[Tensor], factors: list[Tensor], scale: Tensor | None, groups: list[int]
) -> list[Tensor]:
    def function(inputs: list[Any]) -> list[Tensor]:
        return reference.merge(inputs[:-1], inputs[-1], groups)

    with _autograd():
        return [g.clone() for g in gradients(function, [*factors, scale], grads)]


@_fake("kruify::merge")
def _merge_fake(factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    _torch._check(sum(groups) == len(factors) and min(groups) > 0, lambda: "merge: groups do not cover the factors")
    stages, start = [], 0
    for size in groups:
        rows = cols = 1
        for factor in factors[start : start + size]:
            rows, cols = rows * factor.shape[2], cols * factor.shape[3]
        stages.append(factors[start].new_empty(*factors[start].shape[:2], rows, cols))
        start += size
    return stages


@_fake("kruify::merge_backward")
def _merge_backward_fake(
    grads: list[Tensor], factors: list[Tensor], scale: Tensor | None, groups: list[int]
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _wanted(*factors, scale)]


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    factors, scale, ctx.groups = inputs
    ctx.scaled = scale is not None
    ctx.save_for_backward(*_wanted(*factors, scale))


def _merge_derivative(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    scale = saved.pop() if ctx.scaled else None
    if torch.is_grad_enabled():
        found = gradients(
            lambda t: reference.merge(t[:-1], t[-1], ctx.groups),  # type: ignore[arg-type]
            [*saved, scale],
            grads,
            create_graph=True,
        )
    else:
        found = torch.ops.kruify.merge_backward([g.contiguous() for g in grads], saved, scale, ctx.groups)
    return found[: len(saved)], found[len(saved)] if ctx.scaled else None, None


torch.library.register_autograd("kruify::merge", _merge_derivative, setup_context=_merge_context)


# dense


def dense_on_flat(tensors: list[Any], overlay_index: Tensor | None, layout: list[int]) -> Tensor:
    *stages, diagonal, overlay = tensors
    form = decode(layout)
    like = next(t for t in tensors if t is not None)
    eye = torch.eye(form.cols, dtype=like.dtype, device=like.device)
    return reference.kron_matmul(eye, stages, diagonal, overlay, overlay_index, None, layout).mT


@_fallback("dense")
def _dense(
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    layout: list[int],
) -> Tensor:
    return dense_on_flat([*stages, diagonal, overlay], overlay_index, layout).contiguous()


@_fallback("dense_backward")
def _dense_backward(
    grad: Tensor,
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    layout: list[int],
) -> list[Tensor]:
    with _autograd():
        found = gradients(lambda t: [dense_on_flat(t, overlay_index, layout)], [*stages, diagonal, overlay], [grad])
    return [g.clone() for g in found]


@_fake("kruify::dense")
def _dense_fake(
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    layout: list[int],
) -> Tensor:
    form, like = decode(layout), _wanted(*stages, diagonal, overlay)
    _torch._check(len(like) > 0, lambda: "dense: a matrix without parts")
    return like[0].new_empty(form.gates * form.rows, form.cols)


@_fake("kruify::dense_backward")
def _dense_backward_fake(
    grad: Tensor,
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    layout: list[int],
) -> list[Tensor]:
    return _grads_of(stages, diagonal, overlay)


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    stages, diagonal, overlay, overlay_index, layout = inputs
    _matrix_context(ctx, (stages, diagonal, overlay, overlay_index, None, layout))


def _dense_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, index, weights = _saved(ctx, 0)
    *stages, diagonal, overlay, _ = weights
    if torch.is_grad_enabled():
        found = gradients(
            lambda t: [dense_on_flat(t, index, ctx.layout)], [*stages, diagonal, overlay], [grad], create_graph=True
        )
    else:
        found = torch.ops.kruify.dense_backward(grad, stages, diagonal, overlay, index, ctx.layout)
    grads, of_diagonal, of_overlay, of_index, _, _ = _matrix_grads(found, weights)
    return grads, of_diagonal, of_overlay, of_index, None


torch.library.register_autograd("kruify::dense", _dense_derivative, setup_context=_dense_context)


# kron_matmul


@_fallback("kron_matmul")
def _kron_matmul(x: Tensor, *rest: Any) -> Tensor:
    return reference.kron_matmul(x, *rest[:6])


@_fallback("kron_matmul_backward")
def _kron_matmul_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    stages, diagonal, overlay, overlay_index, bias, layout = rest[:6]
    with _autograd():
        found = gradients(
            lambda t: [_kron_on_flat(t, overlay_index, layout)], [x, *stages, diagonal, overlay, bias], [grad]
        )
    return found[0], [g.clone() for g in found[1:]]


def _kron_on_flat(tensors: list[Any], overlay_index: Tensor | None, layout: list[int]) -> Tensor:
    x, *stages, diagonal, overlay, bias = tensors
    return reference.kron_matmul(x, stages, diagonal, overlay, overlay_index, bias, layout)


@_fake("kruify::kron_matmul")
def _kron_matmul_fake(x: Tensor, *rest: Any) -> Tensor:
    layout = decode(rest[5])
    _torch._check(x.shape[-1] == layout.cols, lambda: f"kron_matmul: x has {x.shape[-1]} columns, W has {layout.cols}")
    return x.new_empty(*x.shape[:-1], layout.gates * layout.rows)


@_fake("kruify::kron_matmul_backward")
def _kron_matmul_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    stages, diagonal, overlay, _, bias = rest[:5]
    return x.new_empty(x.shape), _grads_of(stages, diagonal, overlay, bias)


def _matrix_context(ctx: Any, matrix: tuple[Any, ...], *others: Tensor | None) -> None:
    stages, diagonal, overlay, overlay_index, bias, ctx.layout = matrix
    tensors = [*others, overlay_index, *stages, diagonal, overlay, bias]
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*_wanted(*tensors))


def _saved(ctx: Any, others: int) -> tuple[list[Any], Tensor | None, list[Any]]:
    """What `_matrix_context` put away: the others, the overlay's index, [*stages, diagonal, overlay, bias]."""
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    return tensors[:others], tensors[others], tensors[others + 1 :]


def _matrix_grads(found: list[Tensor], weights: list[Any]) -> tuple[Any, ...]:
    """Gradients as the operators order them, spread over (stages, diagonal, overlay, overlay_index, bias, layout)."""
    rest = iter(found)
    grads = [None if w is None else next(rest) for w in weights]
    return grads[:-3], grads[-3], grads[-2], None, grads[-1], None


def _one_an_input(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The dispatcher hands over no argument that equals its default, and wants no gradient of it."""
    return grads[: len(ctx.needs_input_grad)]


def _kron_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *matrix, ctx.precision = inputs
    _matrix_context(ctx, tuple(matrix), x)


def _kron_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,), index, weights = _saved(ctx, 1)
    if torch.is_grad_enabled():
        grad_x, *found = gradients(
            lambda t: [_kron_on_flat(t, index, ctx.layout)], [x, *weights], [grad], create_graph=True
        )
    else:
        *stages, diagonal, overlay, bias = weights
        grad_x, found = torch.ops.kruify.kron_matmul_backward(
            grad, x, stages, diagonal, overlay, index, bias, ctx.layout, ctx.precision
        )
    return _one_an_input(ctx, grad_x, *_matrix_grads(found, weights), None)


torch.library.register_autograd("kruify::kron_matmul", _kron_derivative, setup_context=_kron_context)


# recurrence


@_fallback("recurrence")
def _recurrence(
    x: Tensor,
    w_ih: Tensor | None,
    bias_ih: Tensor | None,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    kind: str,
    reverse: bool,
    training: bool,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, h, c, workspace = reference.recurrence(
        x, w_ih, bias_ih, batch_sizes, h0, c0, stages, diagonal, overlay, overlay_index, bias, layout, kind, reverse
    )
    kept = workspace if training else workspace[:0]
    return out.clone(), h.clone(), h0.new_empty(0) if c is None else c.clone(), kept.clone()


@_fallback("recurrence_backward")
def _recurrence_backward(
    grad_out: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    out: Tensor,
    workspace: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    stages: list[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    kind: str,
    reverse: bool,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    eye = torch.eye(h0.shape[1], dtype=h0.dtype, device=h0.device)
    dense = reference.kron_matmul(eye, stages, diagonal, overlay, overlay_index, None, layout).T
    grad_gates, grad_product, grad_h0, grad_c0 = reference.recurrence_backward(
        grad_out, grad_h, grad_c, out, workspace, batch_sizes, h0, c0, dense, bias, kind, reverse
    )
    before = reference.previous_states(out, batch_sizes.tolist(), h0, reverse)
    inner = None if kind in reference.MODRELU else bias
    _, grads = _kron_matmul_backward(grad_product, before, stages, diagonal, overlay, overlay_index, inner, layout)
    if bias is not None and inner is None:
        grads.append(reference.modrelu_bias_backward(workspace, grad_gates, kind).sum(0))
    return grad_gates, grad_h0, h0.new_empty(0) if c0 is None else grad_c0, grads


@_fake("kruify::recurrence")
def _recurrence_fake(
    x: Tensor,
    w_ih: Tensor | None,
    bias_ih: Tensor | None,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout, kind, _, training = rest[5:9]
    form, width = decode(layout), x.shape[-1] if w_ih is None else w_ih.shape[0]
    _torch._check(kind in reference.GATES, lambda: f"recurrence: unknown kind '{kind}'")
    _torch._check(form.gates == reference.GATES[kind], lambda: f"recurrence: {kind} does not have {form.gates} gates")
    _torch._check(x.dim() == 2 and h0.dim() == 2, lambda: "recurrence: x and h0 must have two dimensions")
    _torch._check(width == form.gates * form.rows, lambda: f"recurrence: gates of width {width} for {form}")
    _torch._check(form.rows == form.cols == h0.shape[1], lambda: f"recurrence: a state of {h0.shape[1]} for {form}")
    _torch._check((c0 is not None) == (kind == "lstm"), lambda: "recurrence: c0 belongs to kind 'lstm' alone")
    columns = reference.WORKSPACE[kind] * form.rows
    return (
        h0.new_empty(x.shape[0], form.rows),
        h0.new_empty(h0.shape),
        h0.new_empty(0) if c0 is None else h0.new_empty(h0.shape),
        h0.new_empty(x.shape[0] if training else 0, columns),
    )


@_fake("kruify::recurrence_backward")
def _recurrence_backward_fake(
    grad_out: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    out: Tensor,
    workspace: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    stages, diagonal, overlay, _, bias, layout = rest[:6]
    form = decode(layout)
    return (
        out.new_empty(out.shape[0], form.gates * form.rows),
        h0.new_empty(h0.shape),
        h0.new_empty(0) if c0 is None else h0.new_empty(h0.shape),
        _grads_of(stages, diagonal, overlay, bias),
    )


@_fake("kruify::layer_backward")  # every part of it has a fake of its own
@_fallback("layer_backward")
def _layer_backward(
    grad_out: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    w_ih: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *call, needs_x, needs_w, needs_b = rest[:16]
    precision = rest[16] if len(rest) > 16 else 0
    grad_gates, grad_h0, grad_c0, grads = torch.ops.kruify.recurrence_backward(
        grad_out, grad_h, grad_c, *call, precision
    )
    grad_x, grad_w = grad_gates, grad_gates.new_empty(0)
    if w_ih is not None:
        grad_x = grad_gates @ w_ih if needs_x else x.new_empty(0, x.shape[1])
        grad_w = grad_gates.T @ x if needs_w else w_ih.new_empty(0, w_ih.shape[1])
    grad_b = grad_gates.sum(0) if needs_b else grad_gates.new_empty(0)
    return grad_x, grad_w, grad_b, grad_h0, grad_c0, grads


def _recurrence_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_ih, bias_ih, batch_sizes, h0, c0, *matrix, ctx.kind, ctx.reverse, training, ctx.precision = inputs
    out, _, _, workspace = output
    ctx.set_materialize_grads(False)
    ctx.training = training
    # Where the gates come ready made, x is kept for second derivatives only, but costs nothing: its maker holds it.
    _matrix_context(ctx, tuple(matrix), x, w_ih, bias_ih, batch_sizes, h0, c0, out, workspace)


def _recurrence_derivative(
    ctx: Any, grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    (x, w_ih, bias_ih, batch_sizes, h0, c0, out, workspace), index, weights = _saved(ctx, 8)
    if not ctx.training:
        raise UsageError("recurrence was run with training=False, so it has no derivative", hint="Pass training=True")
    if torch.is_grad_enabled():
        call = (batch_sizes, index, ctx.layout, ctx.kind, ctx.reverse)
        found = iter(
            gradients(
                lambda t: _recurrence_on_flat(t, *call),
                [x, w_ih, bias_ih, h0, c0, *weights],
                [grad_out, grad_h, None if c0 is None else grad_c],
                create_graph=True,
            )
        )
        first = [None if t is None else next(found) for t in (x, w_ih, bias_ih, h0, c0)]
        grad_x, grad_w, grad_b, grad_h0, grad_c0 = first
        grads = list(found)
    else:
        *stages, diagonal, overlay, bias = weights
        wanted = ctx.needs_input_grad[:3]
        *of_input, grad_h0, grad_c0, grads = torch.ops.kruify.layer_backward(
            _contiguous(grad_out), _contiguous(grad_h), _contiguous(grad_c), x, w_ih, out, workspace, batch_sizes,
            h0, c0, stages, diagonal, overlay, index, bias, ctx.layout, ctx.kind, ctx.reverse, *wanted, ctx.precision,
        )  # fmt: skip
        grad_x, grad_w, grad_b = (g if w else None for g, w in zip(of_input, wanted, strict=True))
    grad_c0 = None if c0 is None else grad_c0
    first = [grad_x, grad_w, grad_b, None, grad_h0, grad_c0]
    return _one_an_input(ctx, *first, *_matrix_grads(grads, weights), None, None, None, None)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _recurrence_on_flat(
    tensors: list[Any],
    batch_sizes: Tensor,
    overlay_index: Tensor | None,
    layout: list[int],
    kind: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w_ih, bias_ih, h0, c0, *stages, diagonal, overlay, bias = tensors
    return reference.recurrence(
        x, w_ih, bias_ih, batch_sizes, h0, c0, stages, diagonal, overlay, overlay_index, bias, layout, kind, reverse
    )[:3]


torch.library.register_autograd("kruify::recurrence", _recurrence_derivative, setup_context=_recurrence_context)


# Under autocast the operators work on float32, whatever their inputs are rounded to; `precision` says how exactly.
for _name in ("kron_matmul", "recurrence"):
    for _variant in (_name, f"{_name}_forward"):
        for _device in ("cpu", "cuda"):
            _torch.library.register_autocast(f"kruify::{_variant}", _device, torch.float32)
