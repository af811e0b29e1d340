"""The compiled path: a `KroneckerMatrix` and one layer and direction, turned into one operator call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.layers.steps import State
from kruify.ops import Layout, TermLayout, functions, has_kernel, precision
from kruify.ops.functions import Assembly
from kruify.ops.stages import LANES, TermPlan, plan, plan_pair

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
Weights = dict[str, KroneckerMatrix | Tensor | None]
_CACHE = "_kernel_form"  # attribute of a KroneckerMatrix
_STREAMING = "_kernel_streaming"  # attribute of a cell
_HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Form:
    """What the operators need to know of a matrix. Costs are vector multiply-adds of one product with one vector."""

    assembly: Assembly
    whole: Assembly  # the same, W formed first
    plans: list[TermPlan]
    cost: float  # of the terms and the diagonal
    dense: float  # of W itself

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
    plain = Layout(gates, rows, cols, (), (TermLayout(1, tuple(range(gates))),)).encode()
    cost = sum(p.cost for p in plans) + len(matrix.diagonal_gates) * rows / LANES
    dense = gates * -(-rows // LANES) * cols
    return Form(assembly, replace(assembly, whole=plain), plans, cost, dense)


def parameters_of(matrix: KroneckerMatrix, form: Form) -> list[Tensor]:
    """Factors, and scales where there are any, of all terms, as the form's assemblies take them."""
    found: list[Tensor] = []
    for p, module in zip(form.plans, matrix.terms._modules.values(), strict=True):
        assert isinstance(module, KroneckerTerm)
        held = module.factors._parameters  # a ParameterList takes a microsecond an element
        factors = [held[str(i)] for i in p.order] if len(held) == len(p.order) else [module.factors[i] for i in p.order]
        found += _repeated(factors, p) if module.stacked else factors  # type: ignore[arg-type]
        if module.scale is not None:
            found.append(module.scale)
    return found


def _repeated(factors: list[Tensor], p: TermPlan) -> list[Tensor]:
    """What stacked gates share, repeated for each; but for the trailing stage, which the CPU's kernels take once."""
    once = len(factors) - 1 if factors[0].device.type == "cpu" and not p.merges else 0
    gates = factors[0].shape[0]
    return [factor if f == once else factor.expand(gates, -1, -1, -1) for f, factor in enumerate(factors)]


def stages_of(matrix: KroneckerMatrix) -> list[Tensor]:
    """The factors of all terms, merged into stages. They are merged in every call: nobody can tell for certain that a
    factor is still what it was (fused optimisers and `.data` change it without counting a version)."""
    form = form_of(matrix)
    parameters = parameters_of(matrix, form)
    if not torch.is_grad_enabled():
        return form.assembly.stages(parameters)
    return form.assembly.differentiable_stages(parameters)


def work(matrix: KroneckerMatrix, form: Form, kind: str, batch: int) -> tuple[float, bool]:
    """What the kernel takes for a product with one of `batch` vectors, in vector multiply-adds, and whether it is less
    with W formed first. Weights read off benchmarks/dispatch_rule.py."""
    cost = form.cost
    if matrix.overlay is not None:
        blocks, block = matrix.overlay.values.shape  # not the form's: an overlay that is annealed changes its size
        # A block costs a multiply-add, or, with samples in the lanes, each of its numbers a share of one. The shares
        # of W at which torch's own layer then catches up in training were measured: about 12 % for the LSTM, 35 % for
        # the others.
        cost += blocks * (block * (5 if kind == "lstm" else 12) / LANES if batch > 8 else 1)
    # Few samples wait for W from the cache, and in training for its gradient, which is read and written for up to eight
    # of them together; a small W waits in a nearer cache.
    gates, rows, cols = form.layout[:3]
    few = max(0.0, 1 - batch / 8)
    waits = 0.7 if torch.is_grad_enabled() and gates * rows * cols < 1 << 16 else 3
    whole = (1 + waits * few**2) * form.dense + 100 * gates * few
    return (whole, True) if whole < cost else (cost, False)


# torch.compile cannot look into it; all of it is known then.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def template_fits(gates: int, rank: int, rows1: int, rows2: int, training: bool, wanted: int, device: int) -> bool:
    """Whether the CUDA templates take a recurrence on GPU number `device`: what the kernels themselves ask before a
    launch, `pair_fits` in csrc/cuda/pair_plan.h."""
    return _template_fits_cached(gates, rank, rows1, rows2, training, wanted, device)


@lru_cache(maxsize=256)
def _template_fits_cached(*question: int) -> bool:
    return bool(torch.ops.kruify.template_fits(*question))


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
    return single and x.dtype in _HALVES and torch.is_autocast_enabled(x.device.type)


def matmul(matrix: KroneckerMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias through the compiled product: (..., cols) -> (..., gates * rows)."""
    operator = torch.ops.kruify.kron_matmul if torch.is_grad_enabled() else torch.ops.kruify.kron_matmul_forward
    result: Tensor = operator(x, *arguments(matrix, bias), precision.of_products(x.device))
    return result


def run_direction(
    weights: Weights,
    kind: str,  # lstm | gru | rnn_tanh | rnn_relu | rnn_modrelu
    data: Tensor,  # (sum of batch_sizes, features), packed
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    state: State,  # each (batch_sizes[0], size)
    reverse: bool,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    """Runs one layer in one direction over packed sequences, sorted by descending length."""
    weight_ih, matrix = weights["weight_ih"], weights["weight_hh"]
    bias_ih, bias_hh = weights["bias_ih"], weights["bias_hh"]
    assert isinstance(matrix, KroneckerMatrix) and not isinstance(bias_hh, nn.Module)
    if isinstance(weight_ih, KroneckerMatrix):
        assert not isinstance(bias_ih, nn.Module)
        data, weight_ih, bias_ih = matmul(weight_ih, data, bias_ih), None, None
    elif data.is_cuda and torch.is_autocast_enabled("cuda"):
        # One product of torch's in autocast's precision; the operator would have it in float32.
        data, weight_ih, bias_ih = F.linear(data, weight_ih, bias_ih), None, None  # type: ignore[arg-type]
    h0, c0 = state[0], state[1] if kind == "lstm" else None
    first: Any = (data, weight_ih, bias_ih, batch_sizes, h0, c0)
    exact, form = precision.of_products(data.device), form_of(matrix)
    assembly = form.whole if not data.is_cuda and work(matrix, form, kind, h0.shape[0])[1] else form.assembly
    if torch.is_grad_enabled() and functions.lean(data.device.type):
        rest = (bias_hh, matrix.diagonal, *overlay_of(matrix))
        out, h, c = functions.recurrence(assembly, kind, reverse, exact, first, rest, parameters_of(matrix, form))
    else:
        given = arguments(matrix, bias_hh) if assembly is form.assembly else whole_arguments(matrix, bias_hh)
        operator = torch.ops.kruify.recurrence if torch.is_grad_enabled() else torch.ops.kruify.recurrence_forward
        out, h, c, _ = operator(*first, *given, kind, reverse, torch.is_grad_enabled(), exact)
    return out, (h, c) if kind == "lstm" else (h,)


def run_step(cell: nn.Module, weights: Weights, kind: str, x: Tensor, state: State) -> State:
    """One time step of a cell, x (batch, features): the streaming path, with as little Python as can be."""
    # A tensor that is no parameter of the cell was computed for this call alone (torch.nn.utils.parametrize).
    own = all(weights[name] is cell._parameters.get(name) for name in ("weight_ih", "bias_ih", "bias_hh"))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not own or weights["weight_ih"] is None:
        return run_direction(weights, kind, x, torch.full((1,), x.shape[0], device="cpu"), state, reverse=False)[1]
    streaming: Streaming | None = cell.__dict__.get(_STREAMING)
    if streaming is None or not streaming.valid():
        streaming = cell.__dict__[_STREAMING] = Streaming(weights, kind, cell)
    return streaming(x, state)


def streaming_step(cell: nn.Module, x: Tensor, state: State | None) -> State | None:
    """The same step straight away, if one like it was made before; None if it has to be looked at more closely."""
    if state is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    streaming: Streaming | None = cell.__dict__.get(_STREAMING)
    if streaming is None or not streaming.fits(x, state) or not streaming.valid():
        return None
    return streaming(x, state)


class Streaming:
    """The arguments of a cell's operator call, put together once and used while no parameter is replaced."""

    def __init__(self, weights: Weights, kind: str, cell: nn.Module) -> None:
        matrix = weights["weight_hh"]
        assert isinstance(matrix, KroneckerMatrix) and not isinstance(weights["bias_hh"], nn.Module)
        self.operator = torch.ops.kruify.recurrence_forward.default
        weight_ih = weights["weight_ih"]
        assert isinstance(weight_ih, Tensor)
        self.first = (weight_ih, weights["bias_ih"])
        self.columns, self.dtype, self.device = weight_ih.shape[1], weight_ih.dtype, weight_ih.device
        self.rows, self.states = matrix.rows, 2 if kind == "lstm" else 1
        self.last = (*arguments(matrix, weights["bias_hh"]), kind, False, False)
        self.sizes: dict[int, Tensor] = {}
        modules = list(cell.modules())
        self.held: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for places in ([m._parameters for m in modules], [m._buffers for m in modules]):
            self.held += [(place, name, tensor) for place in places for name, tensor in place.items()]
        self.merged = matrix if any(groups for _, groups, _ in form_of(matrix).assembly.terms) else None

    def fits(self, x: Tensor, state: State) -> bool:
        if x.dim() != 2 or x.shape[1] != self.columns or x.dtype is not self.dtype or x.device != self.device:
            return False
        shape = (x.shape[0], self.rows)
        return len(state) == self.states and state[0].shape == shape and state[-1].shape == shape

    def valid(self) -> bool:
        for place, name, tensor in self.held:  # noqa: SIM110 (all() takes twice as long)
            if place.get(name) is not tensor:
                return False
        return True

    def __call__(self, x: Tensor, state: State) -> State:
        batch = x.shape[0]
        sizes = self.sizes.get(batch)
        if sizes is None:
            sizes = self.sizes[batch] = torch.full((1,), batch, device="cpu")
        last = self.last if self.merged is None else (stages_of(self.merged), *self.last[1:])
        if len(state) == 2:
            _, h, c, _ = self.operator(x, *self.first, sizes, state[0], state[1], *last)
            return h, c
        return (self.operator(x, *self.first, sizes, state[0], None, *last)[1],)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies and pickles of a cell put their own together


Arguments = tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[int]]


def arguments(matrix: KroneckerMatrix, bias: Tensor | None) -> Arguments:
    """The matrix as the operators take it."""
    return stages_of(matrix), matrix.diagonal, *overlay_of(matrix), bias, form_of(matrix).layout


def whole_arguments(matrix: KroneckerMatrix, bias: Tensor | None) -> Arguments:
    """The matrix as one plain stage."""
    stages, diagonal, values, index, _, layout = arguments(matrix, None)
    operator = torch.ops.kruify.dense if torch.is_grad_enabled() else torch.ops.kruify.dense_forward
    dense = operator(stages, diagonal, values, index, layout).view(matrix.gates, 1, matrix.rows, matrix.cols)
    plain = form_of(matrix).whole.whole
    assert plain is not None
    return [dense], None, None, None, bias, plain


def overlay_of(matrix: KroneckerMatrix) -> tuple[Tensor | None, Tensor | None]:
    """Values and index, None where there is no overlay."""
    overlay = matrix.overlay
    return (None, None) if overlay is None else (overlay.values, overlay.index)
