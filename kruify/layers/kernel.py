"""How a `KroneckerMatrix` is handed to the compiled kernels: in which stages, and what they cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.layers.computed import parameter
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.ops import Layout, TermLayout, has_kernel, precision, tracing
from kruify.ops.functions import Assembly, traced, training
from kruify.ops.kron_matmul import multiply
from kruify.ops.stages import LANES, TermPlan, plan, plan_pair

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_CACHE = "_kernel_form"  # attribute of a KroneckerMatrix
HALVES = (torch.float16, torch.bfloat16)
FORMED_FROM = 32
"""Vectors from which on forming W (50 to 250 microseconds) is less than what its product saves."""


@dataclass
class Form:
    """What the operators need to know of a matrix. Costs are vector multiply-adds of one product with one vector."""

    assembly: Assembly
    whole: Assembly  # the same, W formed first
    plans: list[TermPlan]
    cost: float  # of the terms and the diagonal
    dense: float  # of W itself
    low_rank: bool | None = None  # as the eight-bit kernels take it; None: nobody has asked

    @property
    def layout(self) -> list[int]:
        return self.assembly.layout


def form_of(matrix: KroneckerMatrix) -> Form:
    forms: dict[str, Form] | None = matrix.__dict__.get(_CACHE)
    if forms is None:
        forms = matrix.__dict__[_CACHE] = {"cpu": _form(matrix, _cpu_plan)}
        if has_kernel("cuda"):
            forms["cuda"] = _form(matrix, _cuda_plan)
    return forms["cuda" if "cuda" in forms and matrix.device.type == "cuda" else "cpu"]


def _cpu_plan(term: KroneckerTerm) -> TermPlan:
    gates = len(term.gates)
    return plan(term.shapes, gates * term.term.rank, sharing=gates if term.stacked else 1)


def _cuda_plan(term: KroneckerTerm) -> TermPlan:
    return plan_pair(term.shapes, len(term.gates) * term.term.rank)


def _form(matrix: KroneckerMatrix, planned: Callable[[KroneckerTerm], TermPlan]) -> Form:
    gates, rows, cols = matrix.gates, matrix.rows, matrix.cols
    plans, terms, parts = [], [], []
    for module in matrix.term_list():
        p = planned(module)
        scaled = module.scale is not None
        plans.append(p)
        terms.append(TermLayout(len(p.groups), module.gates))
        parts.append((len(p.order), p.groups if p.merges or scaled else None, scaled))
    layout = Layout(gates, rows, cols, matrix.diagonal_gates, tuple(terms)).encode()
    assembly = Assembly(tuple(parts), layout)
    one_stage = Layout(gates, rows, cols, (), (TermLayout(1, tuple(range(gates))),)).encode()
    cost = sum(p.cost for p in plans) + len(matrix.diagonal_gates) * rows / LANES
    dense = gates * -(-rows // LANES) * cols
    return Form(assembly, replace(assembly, whole=one_stage), plans, cost, dense)


def parameters_of(matrix: KroneckerMatrix, form: Form) -> list[Tensor]:
    """Factors, and scales where there are any, of all terms, as the form's assemblies take them."""
    found: list[Tensor] = []
    for p, module in zip(form.plans, matrix.terms._modules.values(), strict=True):
        assert isinstance(module, KroneckerTerm)
        held = module.factors  # a ParameterList takes a microsecond per element
        factors: Any = [parameter(held, str(i)) for i in p.order]
        scale = parameter(module, "scale")
        found += _repeated(factors, p, scale is not None) if module.stacked else factors
        if scale is not None:
            found.append(scale)
    return found


def _repeated(factors: list[Tensor], p: TermPlan, scaled: bool) -> list[Tensor]:
    """What stacked gates share, repeated for each; but for the trailing stage, which the kernels take once, on CUDA
    that of outer products. `merge` takes the factors of every gate."""
    shared = (factors[0].device.type == "cpu" or _outer(p)) and not p.merges and not scaled
    once = len(factors) - 1 if shared else 0
    gates = factors[0].shape[0]
    return [factor if f == once else factor.expand(gates, -1, -1, -1) for f, factor in enumerate(factors)]


def _outer(p: TermPlan) -> bool:
    """Whether the stages are a column and a row."""
    return len(p.shapes) == 2 and p.shapes[0][1] == p.shapes[1][0] == 1


class LowRank(NamedTuple):
    """A matrix of outer products, as the low-rank CUDA kernel takes it, and what stands beside them (0: nothing):
    `LowRankSizes` in csrc/cuda/low_rank_plan.h."""

    hidden: int
    gates: int
    sets: int  # 1 where all gates have their rows in common, else the number of gates
    rank: int
    pair: int = 0  # products of a term of two square stages of all gates, and the stages' rows
    rows1: int = 0
    rows2: int = 0
    blocks: int = 0  # of the sparse residual, and rows of a block
    block: int = 0


def low_rank(matrix: KroneckerMatrix) -> LowRank | None:
    """None for any other matrix. As `outer_places` in csrc/cuda/outer_products.h counts outer products, and
    `low_rank_plan_for` in schedule.h what stands beside."""
    found = list(zip(matrix.term_list(), form_of(matrix).plans, strict=True))
    terms = [term for term, p in found if _outer(p)]
    others = [(term, p.shapes) for term, p in found if not _outer(p)]
    if not terms or len(others) > 1:
        return None
    ranks = [sum(term.term.rank for term in terms if gate in term.gates) for gate in range(matrix.gates)]
    shared = all(term.stacked and term.scale is None and len(term.gates) == matrix.gates for term in terms)
    beside = (0, 0, 0)
    for term, shapes in others:
        if len(shapes) != 2 or len(term.gates) != matrix.gates or any(p != q for p, q in shapes):
            return None
        beside = (term.term.rank, shapes[0][0], shapes[1][0])
    blocks = (0, 0) if matrix.overlay is None else matrix.overlay.values.shape
    sets = 1 if shared or matrix.gates == 1 else matrix.gates
    return LowRank(matrix.rows, matrix.gates, sets, max(ranks), *beside, *blocks)


def known_batch(batch: int) -> int:
    """A batch size as the rules of speed look at it: 9 stands for all above 8, and for any while a program for every
    batch is recorded (torch.export), which a look at the size would tie to it."""
    if not torch.compiler.is_compiling():
        return min(batch, 9)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return next((n for n in range(9) if statically_known_true(batch == n)), 9)


def work(matrix: KroneckerMatrix, form: Form, kind: str, batch: int) -> tuple[float, bool]:
    """What the kernel takes for a product with one of `batch` vectors, in vector multiply-adds, and whether it is less
    with W formed first; `batch` as `known_batch` has it. Weights read off benchmarks/dispatch_rule.py."""
    cost = form.cost
    if matrix.overlay is not None:
        blocks, block = matrix.overlay.values.shape  # not the form's: a residual that is annealed changes its size
        # A block costs a multiply-add, or, with samples in the lanes, each of its numbers a share of one. The shares
        # of W at which torch's own layer then catches up in training were measured: about 12 % for the LSTM, 35 % for
        # the others.
        cost += blocks * (block * (5 if kind == "lstm" else 12) / LANES if batch > 8 else 1)
    # Few samples wait for W from the cache, and in training for its gradient, which is read and written for up to eight
    # of them together; a small W waits in a nearer cache.
    gates, rows, cols = form.layout[:3]
    few = max(0.0, 1 - batch / 8)
    waits = 0.7 if training() and gates * rows * cols < 1 << 16 else 3
    whole = (1 + waits * few**2) * form.dense + 100 * gates * few
    return (whole, True) if whole < cost else (cost, False)


def project(
    matrix: KroneckerMatrix,
    x: Tensor,  # (n, cols)
    bias: Tensor | None,  # (gates * rows,)
    kind: str,
    exact: int,
) -> Tensor:  # (n, gates * rows)
    """x @ W.T + bias for all steps at once. Where that is less work W is formed, for torch's product of matrices."""
    form = form_of(matrix)
    many = not x.is_cuda and not traced() and x.shape[0] >= FORMED_FROM
    if many and work(matrix, form, kind, known_batch(x.shape[0]))[1]:
        return F.linear(x, matrix.to_dense(), bias)
    return multiply(form.assembly, exact, x, bias, matrix.parts_beside_terms(), parameters_of(matrix, form))


# torch.compile cannot look into these; all of it is known then.
@tracing.constant
def template_fits(gates: int, rank: int, rows1: int, rows2: int, training: bool, wanted: int, device: int) -> bool:
    """Whether the CUDA templates take a recurrence on GPU number `device`: what the kernels themselves ask before a
    launch, `pair_fits` in csrc/cuda/pair_plan.h."""
    return _asked("template_fits", gates, rank, rows1, rows2, training, wanted, device)


@tracing.constant
def low_rank_fits(found: LowRank, batch: int, wanted: int, device: int) -> bool:
    """Whether a low-rank recurrence is one launch; else it goes step by step."""
    return _asked("low_rank_fits", found, batch, wanted, device)


@tracing.constant
def low_rank_pays(found: LowRank, batch: int, training: bool, kept: bool, wanted: int, device: int) -> bool:
    """Whether a low-rank recurrence on GPU number `device` is expected to beat torch's with the dense weight, by a
    model of bytes and multiply-adds: `low_rank_pays` in csrc/cuda/low_rank_plan.h. `kept`: a CUDA graph may keep its
    launches."""
    return _asked("low_rank_pays", found, batch, training, kept, wanted, device)


def goes_stepwise(matrix: KroneckerMatrix, h: Tensor, wanted: int) -> bool:
    """Whether the recurrence of a matrix on a GPU is one of low rank that fits in no kernel; h (batch, size)."""
    found = low_rank(matrix)
    return found is not None and not low_rank_fits(found, h.shape[0], wanted, h.device.index)


@lru_cache(maxsize=256)
def _asked(operator: str, *question: int | LowRank) -> bool:
    yes = bool(getattr(torch.ops.kruify, operator)(*question))
    if yes:
        warnings.warn(  # once: the text is always the same
            "kruify's CUDA kernels have been tested on an emulated GPU alone, and never measured: backend='dense' runs"
            " torch's own kernels instead (docs/gpu.md)",
            RuntimeWarning,
            stacklevel=2,
        )
    return yes


@tracing.constant
def say_dense() -> bool:
    """Says, once in a process, that factors are multiplied out for a layer on a GPU."""
    warnings.warn(
        "a layer on CUDA runs with its dense weight, by torch's own kernels: kruify has none for its structure and size"
        " on this GPU, or was built without CUDA. The file stays small; memory and time on the GPU are those of the"
        " dense layer (docs/gpu.md)",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def serves(weight_hh: object, x: Tensor, projected: bool) -> bool:
    """Whether the compiled kernels can run a layer with this recurrent matrix on this input."""
    if not isinstance(weight_hh, KroneckerMatrix) or projected or not has_kernel(x.device.type):
        return False
    if x.is_cuda and not template_fits(1, 1, 4, 4, False, precision.FLOAT32, x.device.index):
        return False  # a GPU that the library was not compiled for: what fits nowhere else fits not even the smallest
    dtype = weight_hh.dtype
    if x.dtype in COMPLEX:
        return dtype in (x.dtype, COMPLEX[x.dtype])
    single = dtype in (torch.float32, torch.complex64)
    return single and x.dtype in HALVES and torch.is_autocast_enabled(x.device.type)
