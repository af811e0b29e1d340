"""The compiled path of a complex state: real numbers, the real parts of the state first, then the imaginary ones.

With R(A) = [[Re A, -Im A], [Im A, Re A]], the real form of a complex matrix,

    R(A (x) B) = R(A) (x) Re B + R(iA) (x) Im B,

so a complex product of two stages is a real one of twice the rank, and the operators need no complex arithmetic but
modReLU's. The output in this order is already the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.ops import Layout, TermLayout, precision, reference
from kruify.ops.stages import TermPlan, plan_complex


@dataclass(frozen=True)
class Form:
    """What the operators need to know of a complex matrix. Without plans it is formed in full."""

    layout: list[int]
    plans: tuple[TermPlan, ...]


def form(matrix: KroneckerMatrix, templates: bool) -> Form:
    """`templates`: in stages that the CUDA templates take, where there are such."""
    size = 2 * matrix.rows
    plans: tuple[TermPlan, ...] = ()
    if matrix.diagonal is None and matrix.overlay is None:
        plans = tuple(plan_complex(m.term.factors, m.term.rank, templates) for m in matrix.term_list())
    terms = tuple(TermLayout(len(p.groups), (0,)) for p in plans) or (TermLayout(1, (0,)),)
    return Form(Layout(1, size, size, (), terms).encode(), plans)


def run(
    form: Form,
    matrix: KroneckerMatrix,  # complex, (N, N)
    w_ih: Tensor,  # complex, (N, features)
    bias: Tensor | None,  # (N,) of modReLU
    data: Tensor,  # (S, features), packed, real
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    h0: Tensor,  # complex, (B, N)
) -> tuple[Tensor, Tensor]:  # output (S, 2 N) real, final state (B, N) complex
    """One layer over packed sequences, sorted by descending length."""
    training = torch.is_grad_enabled()
    operator = torch.ops.kruify.recurrence if training else torch.ops.kruify.recurrence_forward
    stages = _stages(form, matrix)
    h0, w_ih = reference.planar(h0), torch.cat([w_ih.real, w_ih.imag])
    kind = "rnn_modrelu_complex"
    out, h, _, _ = operator(
        data, w_ih, None, batch_sizes, h0, None, stages, None, None, None, bias, form.layout, kind, False, training,
        precision.of_products(data.device),
    )  # fmt: skip
    return out, reference.state_of(h, kind)


def _stages(form: Form, matrix: KroneckerMatrix) -> list[Tensor]:
    if not form.plans:
        return [_real_form(matrix.to_dense()[None, None])]
    return [s for p, module in zip(form.plans, matrix.term_list(), strict=True) for s in _term_stages(p, module)]


def _term_stages(plan: TermPlan, module: KroneckerTerm) -> list[Tensor]:
    first, *rest = reference.merge(list(module.factors), module.scale, plan.groups)
    if not rest:
        return [_real_form(first)]
    return [torch.cat([_real_form(first), _real_form(1j * first)], dim=1), torch.cat([rest[0].real, rest[0].imag], 1)]


def _real_form(a: Tensor) -> Tensor:  # (..., P, Q) complex -> (..., 2 P, 2 Q)
    real, imaginary = a.real, a.imag
    return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2)
