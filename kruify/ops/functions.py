"""Derivatives of the operators with less Python around them than torch.library puts there: its trees of arguments take
longer than a short sequence. Factors are merged, W is formed and the operator runs in one node of the graph.
Under torch.compile, torch.func and autocast the operators themselves serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kruify.ops import operators, reference

Optional = Tensor | None
_ops = torch.ops.kruify


def lean(device_type: str) -> bool:
    """Whether a call with derivatives may go past the dispatcher's autograd."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(device_type)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@dataclass(frozen=True)
class Assembly:
    """How the parameters of a Kronecker matrix become an operator's arguments.

    terms: of each term its number of factors, the groups in which they are merged (None: each is a stage), and whether
        a scale follows them in the list of parameters.
    layout: of the matrix (ops/layout.py).
    whole: the layout of W as one plain stage where W is formed before the operator runs; else None.
    """

    terms: tuple[tuple[int, tuple[int, ...] | None, bool], ...]
    layout: list[int]
    whole: list[int] | None = None

    def stages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Factors, and scales where there are any, of all terms -> stages; no derivatives."""
        return self._each_term(_ops.merge_forward.default, parameters)

    def differentiable_stages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The same through the dispatcher's autograd."""
        return self._each_term(_ops.merge, parameters)

    def reference_stages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The same, differentiable any number of times."""
        return self._each_term(reference.merge, parameters)

    def _each_term(self, merge: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
        stages: list[Tensor] = []
        at = 0
        for count, groups, scaled in self.terms:
            factors, at = parameters[at : at + count], at + count + scaled
            if groups is not None:
                factors = merge(factors, parameters[at - 1] if scaled else None, groups)
            stages += factors
        return stages

    def backward(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the stages -> those of the parameters."""
        found: list[Tensor] = []
        stage = at = 0
        for count, groups, scaled in self.terms:
            factors, at = parameters[at : at + count], at + count + scaled
            size = count if groups is None else len(groups)
            part, stage = grads[stage : stage + size], stage + size
            if groups is not None:
                part = _ops.merge_backward.default(part, factors, parameters[at - 1] if scaled else None, groups)
            found += part
        return found

    def formed(self, stages: list[Tensor], diagonal: Optional, overlay: Optional, index: Optional) -> Tensor:
        """W as the one stage of the layout `whole`; no derivatives."""
        gates, rows, cols = self.layout[:3]
        dense: Tensor = _ops.dense_forward.default(stages, diagonal, overlay, index, self.layout)
        return dense.view(gates, 1, rows, cols)


def recurrence(
    assembly: Assembly,
    kind: str,
    reverse: bool,
    precision: int,
    first: tuple[Optional, ...],  # x, w_ih, bias_ih, batch_sizes, h0, c0
    rest: tuple[Optional, ...],  # bias, diagonal, overlay, overlay_index
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # out, hT, cT
    """torch.ops.kruify.recurrence with training=True."""
    found: tuple[Tensor, Tensor, Tensor] = _Recurrence.apply(  # type: ignore[no-untyped-call]
        assembly, kind, reverse, precision, *first, *rest, *parameters
    )
    return found


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, kind: str, reverse: bool, precision: int, *tensors: Any) -> Any:
        bias, diagonal, overlay, index = tensors[6:10]
        stages = assembly.stages(tensors[10:])
        matrix: tuple[Any, ...] = (stages, diagonal, overlay, index, bias, assembly.layout)
        if assembly.whole is not None:
            dense = assembly.formed(stages, diagonal, overlay, index)
            matrix = ([dense], None, None, None, bias, assembly.whole)
        out, h, c, workspace = _ops.recurrence_forward.default(*tensors[:6], *matrix, kind, reverse, True, precision)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.count = (assembly, kind, reverse, precision), len(tensors)
        ctx.save_for_backward(*tensors, out, workspace, *(stages if matrix[0] is stages else (dense, *stages)))
        return out, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assembly, kind, reverse, precision = ctx.call
        saved, count = ctx.saved_tensors, ctx.count
        x, w_ih, _, sizes, h0, c0, bias, diagonal, overlay, index, *parameters = saved[:count]
        if torch.is_grad_enabled():
            return None, None, None, None, *_recurrence_twice(ctx.call, saved[:count], grads)
        out, workspace, *stages = saved[count:]
        weights: tuple[Any, ...] = (stages, diagonal, overlay, index, bias, assembly.layout)
        if assembly.whole is not None:
            dense, *stages = stages
            weights = ([dense], None, None, None, bias, assembly.whole)
        grad_out, grad_h, grad_c = (g if g is None or g.is_contiguous() else g.contiguous() for g in grads)
        wanted = ctx.needs_input_grad[4:7]
        *of_input, grad_h0, grad_c0, found = _ops.layer_backward.default(
            *(grad_out, grad_h, grad_c, x, w_ih, out, workspace, sizes, h0, c0, *weights),
            *(kind, reverse, *wanted, precision),
        )
        of_input = [g if w else None for g, w in zip(of_input, wanted, strict=True)]
        grad_bias = None if bias is None else found.pop()
        if assembly.whole is not None:
            dense_grad = found[0].view(-1, assembly.layout[2])
            found = _ops.dense_backward.default(dense_grad, stages, diagonal, overlay, index, assembly.layout)
        return (
            *(None, None, None, None),
            *(*of_input, None, grad_h0, None if c0 is None else grad_c0, grad_bias),
            *spread(assembly, found, diagonal, overlay, parameters),
        )


def _recurrence_twice(call: Any, saved: Sequence[Any], grads: Any) -> list[Optional]:
    assembly, kind, reverse, _ = call
    sizes, index = saved[3], saved[9]

    def function(t: list[Any]) -> Any:
        x, w_ih, bias_ih, _, h0, c0, bias, diagonal, overlay, _, *parameters = t
        stages = assembly.reference_stages(parameters)
        matrix = (stages, diagonal, overlay, index, bias, assembly.layout)
        return reference.recurrence(x, w_ih, bias_ih, sizes, h0, c0, *matrix, kind, reverse)[:3]

    return twice(function, saved, (3, 9), [*grads[:2], None if saved[5] is None else grads[2]])


def dense(assembly: Assembly, rest: tuple[Optional, ...], parameters: Sequence[Tensor]) -> Tensor:
    """torch.ops.kruify.dense; rest: diagonal, overlay, overlay_index."""
    found: Tensor = _Dense.apply(assembly, *rest, *parameters)  # type: ignore[no-untyped-call]
    return found


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assembly: Assembly, *tensors: Any) -> Tensor:
        stages = assembly.stages(tensors[3:])
        ctx.assembly, ctx.count = assembly, len(tensors)
        ctx.save_for_backward(*tensors, *stages)
        found: Tensor = _ops.dense_forward.default(stages, *tensors[:3], assembly.layout)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assembly, saved, count = ctx.assembly, ctx.saved_tensors, ctx.count
        diagonal, overlay, index, *parameters = saved[:count]
        if torch.is_grad_enabled():

            def function(t: list[Any]) -> Any:
                stages = assembly.reference_stages(t[3:])
                return [operators.dense_on_flat([*stages, t[0], t[1]], index, assembly.layout)]

            return None, *twice(function, saved[:count], (2,), grads)
        found = _ops.dense_backward.default(grads[0], list(saved[count:]), diagonal, overlay, index, assembly.layout)
        return None, *spread(assembly, found, diagonal, overlay, parameters)


def spread(
    assembly: Assembly, found: list[Tensor], diagonal: Optional, overlay: Optional, parameters: Sequence[Tensor]
) -> tuple[Optional, ...]:
    """Gradients as the operators order them, stages, diagonal, overlay -> of diagonal, overlay, index, parameters."""
    grad_overlay = None if overlay is None else found.pop()
    grad_diagonal = None if diagonal is None else found.pop()
    return grad_diagonal, grad_overlay, None, *assembly.backward(found, parameters)


def twice(function: Any, saved: Sequence[Any], integers: tuple[int, ...], grads: Any) -> list[Optional]:
    """First derivatives that can be differentiated again, through the reference."""
    inputs = [None if i in integers else t for i, t in enumerate(saved)]
    found = iter(operators.gradients(function, inputs, grads, create_graph=True))
    return [None if t is None else next(found) for t in inputs]
