"""The compiled backend: one operator call per layer and direction, W never formed where that is more work."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.layers import planar
from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.computed import computes
from kruify.layers.kernel import HALVES, form_of, goes_stepwise, known_batch, parameters_of, project, work
from kruify.layers.matrix import KroneckerMatrix
from kruify.ops import graphs, precision
from kruify.ops.functions import traced, training, transformed
from kruify.ops.recurrence import run_recurrence
from kruify.ops.reference import State

if TYPE_CHECKING:
    from kruify.layers.cells import KRUCellBase
    from kruify.layers.recurrent import RecurrentLayer

_STREAMING = "_kernel_streaming"  # attribute of a cell


class CompiledBackend:
    """See the module."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        one = partial(run_direction, layer.kernel_kind, input.batch_sizes)
        output, final = run_each_direction(layer, input.packed(), state, one)
        if training() and layer.num_directions == 1:
            output = output.clone()  # the node keeps its own, and a user may change this one in place, as torch.nn's
        return output, final


def run_direction(
    kind: str,  # a key of kruify.ops.reference.GATES
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    weights: Weights,
    data: Tensor,  # (sum of batch_sizes, features)
    state: State,  # each (batch_sizes[0], size)
    reverse: bool = False,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    """Runs one layer in one direction."""
    exact, device = precision.of_products(data.device), data.device.type
    if not torch.is_autocast_enabled(device):
        return _run(kind, batch_sizes, weights, data, state, reverse, exact)
    if data.is_cuda and isinstance(weights["weight_ih"], Tensor) and kind != "rnn_modrelu_complex":
        # One product of torch's in autocast's precision; the operator would have it in float32.
        data = F.linear(data, weights["weight_ih"], weights["bias_ih"])  # type: ignore[arg-type]
        weights = {**weights, "weight_ih": None, "bias_ih": None}
    with torch.autocast(device, enabled=False):
        return _run(kind, batch_sizes, weights, _single(data), tuple(map(_single, state)), reverse, exact)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _run(
    kind: str, batch_sizes: Tensor, weights: Weights, data: Tensor, state: State, reverse: bool, exact: int
) -> tuple[Tensor, State]:
    w: Any = weights
    weight_ih, matrix, bias_ih, bias = w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"]
    assert isinstance(matrix, KroneckerMatrix)
    if kind == "rnn_modrelu_complex":
        return planar.run(matrix, weight_ih, bias, data, batch_sizes, state[0], exact)
    if isinstance(weight_ih, KroneckerMatrix):
        data, weight_ih, bias_ih = project(weight_ih, data, bias_ih, kind, exact), None, None
    form = form_of(matrix)
    batch = known_batch(state[0].shape[0])
    assembly = form.whole if not data.is_cuda and work(matrix, form, kind, batch)[1] else form.assembly
    first = (data, weight_ih, bias_ih, batch_sizes, state[0], state[1] if kind == "lstm" else None)
    rest, parameters = matrix.parts_beside_terms(), parameters_of(matrix, form)
    kept = graphs.keeps(data, batch_sizes.shape[0], state[0].shape[0]) and goes_stepwise(matrix, state[0], exact)
    out, h, c = run_recurrence(assembly, kind, reverse, exact, first, bias, rest, parameters, kept)
    return out, (h, c) if kind == "lstm" else (h,)


def run_step(cell: KRUCellBase, x: Tensor, state: State) -> State:
    """One time step of a cell, x (batch, features); without derivatives the arguments are kept for the next."""
    weights = cell.weights()
    # A tensor that is no parameter of the cell was computed for this call alone (torch.nn.utils.parametrize).
    own = all(weights[name] is cell._parameters.get(name) for name in ("weight_ih", "bias_ih", "bias_hh"))
    if own and weights["weight_ih"] is not None and not torch.is_grad_enabled() and not traced():
        streaming: Streaming | None = cell.__dict__.get(_STREAMING)
        if (streaming is None or not streaming.valid()) and not computes(weights["weight_hh"]):  # type: ignore[arg-type]
            streaming = cell.__dict__[_STREAMING] = Streaming(cell, weights)
        if streaming is not None and streaming.valid() and streaming.fits(x, state):
            return streaming(x, state)
    sizes = torch.full((1,), x.shape[0], device="cpu")
    return run_direction(cell.kernel_kind, sizes, weights, x, state)[1]


def stream(cell: KRUCellBase, x: Tensor, state: State | None) -> State | None:
    """The same step straight away, if one like it was made before; None if it has to be looked at more closely."""
    if state is None or torch.is_grad_enabled() or traced():
        return None
    streaming: Streaming | None = cell.__dict__.get(_STREAMING)
    if streaming is None or not streaming.fits(x, state) or not streaming.valid() or transformed():
        return None
    return streaming(x, state)


class Streaming:
    """The arguments of a cell's operator call, put together once and used while no parameter is replaced."""

    def __init__(self, cell: KRUCellBase, weights: Weights) -> None:
        matrix, weight_ih, kind = weights["weight_hh"], weights["weight_ih"], cell.kernel_kind
        assert isinstance(matrix, KroneckerMatrix) and isinstance(weight_ih, Tensor)
        self.operator = torch.ops.kruify.recurrence_forward.default
        self.weight_ih, self.bias_ih = weight_ih, weights["bias_ih"]
        self.columns, self.device, self.states = weight_ih.shape[1], weight_ih.device, 2 if kind == "lstm" else 1
        self.matrix, self.form = matrix, form_of(matrix)
        self.rest = (*matrix.parts_beside_terms(), weights["bias_hh"], self.form.layout, kind, False, False)
        self.sizes: dict[int, Tensor] = {}
        self.held: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for module in cell.modules():
            for place in (module._parameters, module._buffers):
                self.held += [(place, name, tensor) for name, tensor in place.items()]
        parameters = parameters_of(matrix, self.form)
        # A stage that is a parameter, or views its memory, changes with it; a product has to be made anew.
        merged = any(groups is not None for _, groups, _ in self.form.assembly.terms)
        self.stages = None if merged else parameters
        shared = [factor for term in matrix.term_list() if term.stacked for factor in term.factors]
        self.viewed = [(factor, factor.data_ptr()) for factor in shared]

    def fits(self, x: Tensor, state: State) -> bool:
        """Whether x and state are what the arguments are for."""
        dtype = self.weight_ih.dtype
        if x.dim() != 2 or x.shape[1] != self.columns or x.dtype is not dtype or x.device != self.device:
            return False
        shape, h, c = (x.shape[0], self.matrix.rows), state[0], state[-1]
        return len(state) == self.states and h.shape == shape and c.shape == shape and h.dtype is c.dtype is dtype

    def valid(self) -> bool:
        """Whether the arguments still are the cell's."""
        for place, name, tensor in self.held:
            if place.get(name) is not tensor:
                return False
        for factor, memory in self.viewed:  # a view keeps the old memory alive, so that new memory is elsewhere
            if factor.data_ptr() != memory:
                return False
        return self.weight_ih.device == self.device

    def __call__(self, x: Tensor, state: State) -> State:
        batch = x.shape[0]
        sizes = self.sizes.get(batch)
        if sizes is None:
            sizes = self.sizes[batch] = torch.full((1,), batch, device="cpu")
        stages = self.stages
        if stages is None:
            stages = self.form.assembly.stages(parameters_of(self.matrix, self.form))
        if len(state) == 2:
            _, h, c, _ = self.operator(x, self.weight_ih, self.bias_ih, sizes, *state, stages, *self.rest)
            return h, c
        return (self.operator(x, self.weight_ih, self.bias_ih, sizes, state[0], None, stages, *self.rest)[1],)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies and pickles of a cell put their own together
