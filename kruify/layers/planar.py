"""The compiled backend of a complex state: real numbers, the real parts of the state first, then the imaginary ones.

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
from kruify.ops import Layout, TermLayout, has_kernel, reference
from kruify.ops.functions import unmerged
from kruify.ops.recurrence import run_recurrence
from kruify.ops.stages import TermPlan, plan_complex

_CACHE = "_complex_form"  # attribute of a KroneckerMatrix


@dataclass(frozen=True)
class Form:
    """What the operators need to know of a complex matrix. Without plans it is formed in full."""

    layout: list[int]
    plans: tuple[TermPlan, ...]


def form_of(matrix: KroneckerMatrix) -> Form:
    forms: dict[str, Form] | None = matrix.__dict__.get(_CACHE)
    if forms is None:
        devices = ("cpu", "cuda") if has_kernel("cuda") else ("cpu",)
        forms = matrix.__dict__[_CACHE] = {device: _form(matrix, device == "cuda") for device in devices}
    return forms["cuda" if "cuda" in forms and matrix.device.type == "cuda" else "cpu"]


def _form(matrix: KroneckerMatrix, templates: bool) -> Form:
    """`templates`: in stages that the CUDA templates take, where there are such."""
    size = 2 * matrix.rows
    plans: tuple[TermPlan, ...] = ()
    if matrix.diagonal is None and matrix.overlay is None:
        plans = tuple(plan_complex(m.term.factors, m.term.rank, templates) for m in matrix.term_list())
    terms = tuple(TermLayout(len(p.groups), (0,)) for p in plans) or (TermLayout(1, (0,)),)
    return Form(Layout(1, size, size, (), terms).encode(), plans)


def run(
    matrix: KroneckerMatrix,  # complex, (N, N)
    w_ih: Tensor,  # complex, (N, features)
    bias: Tensor | None,  # (N,) of modReLU
    data: Tensor,  # (S, features), packed, real
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    h0: Tensor,  # complex, (B, N)
    exact: int,  # kruify.ops.precision
) -> tuple[Tensor, tuple[Tensor]]:  # output (S, 2 N) real, final state (B, N) complex
    """One layer over packed sequences, sorted by descending length."""
    form, kind = form_of(matrix), "rnn_modrelu_complex"
    first = (data, torch.cat([w_ih.real, w_ih.imag]), None, batch_sizes, reference.planar(h0), None)
    out, h, _ = run_recurrence(
        unmerged(form.layout), kind, False, exact, first, bias, (None, None, None), _stages(form, matrix)
    )
    return out, (reference.state_of(h, kind),)


def _stages(form: Form, matrix: KroneckerMatrix) -> list[Tensor]:
    if not form.plans:
        return [_real_form(matrix.to_dense()[None, None])]
    return [s for p, module in zip(form.plans, matrix.term_list(), strict=True) for s in _term_stages(p, module)]


def _term_stages(plan: TermPlan, module: KroneckerTerm) -> list[Tensor]:
    first, *rest = reference.merge(*module.held(), plan.groups)
    if not rest:
        return [_real_form(first)]
    return [torch.cat([_real_form(first), _real_form(1j * first)], dim=1), torch.cat([rest[0].real, rest[0].imag], 1)]


def _real_form(a: Tensor) -> Tensor:  # (..., P, Q) complex -> (..., 2 P, 2 Q)
    real, imaginary = a.real, a.imag
    return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2)
