"""The eight-bit backend: layers whose weights are stored as integers are computed in integers. CPU, inference."""

from __future__ import annotations

import weakref
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.computed import computes
from kruify.layers.kernel import form_of, project
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.layers.storage import MARKS, dense_stored_as
from kruify.ops import Layout, has_kernel, precision
from kruify.ops.functions import traced
from kruify.ops.reference import GATES, MODRELU, State
from kruify.quantization import INTEGERS, quantize_rows, row_dims

if TYPE_CHECKING:
    from kruify.layers.cells import KRUCellBase
    from kruify.layers.recurrent import RecurrentLayer

_ops = torch.ops.kruify
Weight = KroneckerMatrix | Tensor
_DEPTH = 1 << 16  # columns whose products an int32 can add up: kInt8Depth in csrc/int8.h


def run_step(cell: KRUCellBase, x: Tensor, state: State) -> State | None:
    """One time step of a cell, x (batch, features); None where the kernels do not compute it (`prepared`)."""
    ready = prepared(cell, x, state)
    return None if ready is None else _step(cell, ready.directions[0], x, state)


def step(layer: RecurrentLayer | KRUCellBase, weights: Weights, x: Tensor, state: State) -> State:
    """One time step of a cell, or with its weights of a layer and direction; x (batch, features)."""
    return _step(layer, _Arguments(layer.kernel_kind, dense_stored_as(layer, INTEGERS), weights), x, state)


def _step(layer: RecurrentLayer | KRUCellBase, arguments: _Arguments, x: Tensor, state: State) -> State:
    return arguments.run(layer.kernel_kind, None, x.unsqueeze(0), state, False)[1]


def names_in_integers(layer: RecurrentLayer | KRUCellBase, weights: Weights) -> list[str]:
    """Of what the kernels compute (`prepared`) the weights that they multiply with in integers: weight_hh, and
    weight_ih where it is stored so and has no diagonal."""
    return ["weight_hh", *["weight_ih"] * _input_in_integers(weights, dense_stored_as(layer, INTEGERS))]


def prepared(layer: RecurrentLayer | KRUCellBase, x: Tensor, state: State = ()) -> Int8Backend | None:
    """What computes a layer or cell in eight bits; None where the kernels do not. They do where its recurrent matrices
    are stored as integers, dense or of low rank (`_is_low_rank`; with a diagonal and a sparse residual, if any), all is
    float32 on the CPU, and nobody asks for derivatives."""
    if traced() or torch.is_autocast_enabled("cpu"):
        return None
    found = _kept.get(id(layer))
    if found is not None and not found.holds():
        found = None
    if found is None and not _serves(layer):
        return None
    if x.dtype != torch.float32 or not x.is_cpu:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *layer.parameters())):
        return None
    return Int8Backend(layer) if found is None else found


def _serves(layer: RecurrentLayer | KRUCellBase) -> bool:
    dense, recurrent = dense_stored_as(layer, INTEGERS), layer.recurrent_weights()
    if not all([_is_int8(weight, dense) for weight in recurrent]):
        return False
    if getattr(layer, "proj_size", 0) or layer.kernel_kind in MODRELU or not has_kernel("cpu"):
        return False
    return all([w.dtype == torch.float32 and w.device.type == "cpu" for w in [*dense, *recurrent]])


def _is_int8(weight: Weight | None, dense: list[Tensor]) -> bool:
    """Whether the kernels take the weight in eight bits; `dense` are the dense ones that are stored so."""
    if not isinstance(weight, KroneckerMatrix):
        return any(weight is stored and weight.shape[1] <= _DEPTH for stored in dense)
    if weight.storage not in INTEGERS:
        return False
    form = form_of(weight)
    if form.low_rank is None:
        form.low_rank = _is_low_rank(weight)
    return form.low_rank


def _is_low_rank(matrix: KroneckerMatrix) -> bool:
    """Whether all terms are outer products, or no more numbers than the dense matrix when they are written as such."""
    terms = matrix.term_list()
    if not terms or matrix.cols > _DEPTH or any(_outer(term) is None for term in terms):
        return False
    copies = 1 if all(map(_shares_rows, terms)) else matrix.gates
    gate = matrix.rows + matrix.cols * copies / matrix.gates
    numbers = sum(len(term.gates) * _rank(term) * gate for term in terms if _rank(term) > term.term.rank)
    small = numbers <= matrix.gates * matrix.rows * matrix.cols
    return small and copies * (sum(map(_rank, terms)) + 3) <= _DEPTH  # each copy begins at a multiple of four


def _input_in_integers(weights: Weights, dense: list[Tensor]) -> bool:
    weight: Any = weights["weight_ih"]
    if isinstance(weight, KroneckerMatrix) and weight.parts_beside_terms()[0] is not None:
        return False
    return _is_int8(weight, dense)


def _outer(term: KroneckerTerm) -> tuple[int, int] | None:
    """Which factors of a term are a column and one that spans all columns of the matrix; None for any other term."""
    places = [(left, 1 - left) for left in (0, 1) if len(term.shapes) == 2 and term.shapes[left][1] == 1]
    return min(places, key=lambda place: term.shapes[place[1]][0], default=None)


def _rank(term: KroneckerTerm) -> int:
    """The outer products that a term of `_outer` is in each of its gates: one for each row of the second factor."""
    places = _outer(term)
    assert places is not None
    return term.term.rank * term.shapes[places[1]][0]


def _shares_rows(term: KroneckerTerm) -> bool:
    """Whether all gates have the second factor of `_outer` in common."""
    return term.stacked and _outer(term) == (0, 1)


def _outer_products(term: KroneckerTerm) -> tuple[Tensor, Tensor]:
    """Of each gate, or of all gates, their columns (1 or gates, rank, rows), whole numbers, and rows (1 or gates, rank,
    cols) with the scales of both."""
    places = _outer(term)
    assert places is not None
    (left, right), (factors, scale) = places, term.held()
    columns, wide = factors[left], factors[right]
    if bool(columns.isfinite().all()):
        shared = len(columns) > len(wide)
        columns, scales = quantize_rows(columns, row_dims(columns.shape, True, shared))
        columns, wide = columns.to(wide.dtype), wide * scales
    columns = columns.squeeze(3)
    if scale is not None and _shares_rows(term):
        columns = columns * scale[..., None]
    elif scale is not None:
        wide = wide * scale[..., None, None]
    order = "qp" if left == 0 else "pq"  # row p of the second factor meets these rows of the product
    spread = torch.einsum(f"nrq,ip->nri{order}", columns, torch.eye(wide.shape[2]))
    return spread.flatten(3).flatten(1, 2), wide.flatten(1, 2)


class _Arguments:
    """What the operator is given of the weights of one layer and direction."""

    def __init__(self, kind: str, dense: list[Tensor], weights: Weights) -> None:
        w: Any = weights
        weight_ih, weight_hh, gates = w["weight_ih"], w["weight_hh"], GATES[kind]
        of_input: tuple[Any, ...] = (None, [], None, None)
        self.weight_ih = weight_ih  # where the input's share of the gates is computed before; else None
        if _input_in_integers(weights, dense):
            self.weight_ih, of_input = None, (*packed(weight_ih, gates), *_beside(weight_ih)[1:])
        diagonal, *residual = _beside(weight_hh)
        diagonal_gates = () if diagonal is None else weight_hh.diagonal_gates
        rows, cols = weight_hh.shape
        layout = Layout(gates, rows // gates, cols, diagonal_gates, ()).encode()
        self.input = (*of_input, w["bias_ih"])
        self.recurrent = (*packed(weight_hh, gates), [], diagonal, *residual, w["bias_hh"], layout)

    def run(
        self,
        kind: str,  # a key of kruify.ops.reference.GATES
        batch_sizes: Tensor | None,  # (steps,) int64 on the CPU, descending; None where all sequences have all steps
        data: Tensor,  # (sum of batch_sizes, features), or without these (steps, batch, features)
        state: State,  # each (batch, size) or (1, batch, size)
        reverse: bool,
    ) -> tuple[Tensor, State]:  # outputs and final state in the form of data and state
        if self.weight_ih is not None:
            rows = data.flatten(0, -2)
            if isinstance(self.weight_ih, KroneckerMatrix):
                gates = project(self.weight_ih, rows, None, kind, precision.FLOAT32)
            else:
                gates = F.linear(rows, self.weight_ih)
            data = gates.view(*data.shape[:-1], -1)
        h0, c0 = state if kind == "lstm" else (state[0], None)
        run = _ops.int8_recurrence.default
        out, h, c = run(data, *self.input, batch_sizes, h0, c0, *self.recurrent, kind, reverse)
        return out, (h, c) if kind == "lstm" else (h,)


class Int8Backend:
    """See the module: what the operator is given of each direction of one layer, or of a cell. It is put together once
    and kept, unless a weight is computed from others or does not count its versions."""

    def __init__(self, layer: RecurrentLayer | KRUCellBase) -> None:
        kind, dense, weights = layer.kernel_kind, dense_stored_as(layer, INTEGERS), layer.weights_of_directions()
        self.directions = [_Arguments(kind, dense, own) for own in weights]
        places: list[tuple[dict[str, Any], str, object]] = [(vars(layer), MARKS, vars(layer).get(MARKS))]
        for module in layer.modules():
            if isinstance(module, KroneckerMatrix):
                places.append((vars(module), "storage", vars(module).get("storage")))
            for place in (module._parameters, module._buffers, module._modules):
                places += [(place, name, part) for name, part in place.items()]
        self.places, self.names, self.parts = zip(*places, strict=True)  # where all parts of the layer are, and these
        # Biases are given as they are.
        self.made_of = [part for part in self.parts if isinstance(part, Tensor) and part.dim() > 1]
        known = set(map(id, self.parts))
        given = [weight for own in weights for weight in own.values() if weight is not None]
        if any(id(weight) not in known or (isinstance(weight, nn.Module) and computes(weight)) for weight in given):
            return
        if any(t.is_inference() for t in self.made_of):
            return
        self.stamp, key, kept = self._stamp(), id(layer), _kept  # a name that is there when a process ends, too
        self.end = weakref.ref(layer, lambda _: kept.pop(key, None))
        kept[key] = self

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        kind, sizes = layer.kernel_kind, input.packed_sizes
        if len(self.directions) == 1:  # the same with less around it
            return self.directions[0].run(kind, sizes, input.data, state, False)
        directions = iter(self.directions)

        def one(_: Weights, data: Tensor, own: State, reverse: bool) -> tuple[Tensor, State]:
            return next(directions).run(kind, sizes, data, own, reverse)

        return run_each_direction(layer, input.data, state, one)

    def _stamp(self) -> object:
        return [t._version for t in self.made_of], _ops.fingerprint.default(self.made_of)

    def holds(self) -> bool:
        """Whether the layer still is what this was made of. Changes that count no version (through `.data`) are seen
        where they reach one of the elements, 64 or more, of a parameter that are looked at."""
        return all(map(is_, map(dict.get, self.places, self.names), self.parts)) and self.stamp == self._stamp()


_kept: dict[int, Int8Backend] = {}  # by the identity of the layer, which takes its entry with it


def _beside(weight: Weight) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Diagonal, sparse residual and its index, as far as they are there."""
    return weight.parts_beside_terms() if isinstance(weight, KroneckerMatrix) else (None, None, None)


def packed(weight: Weight, gates: int) -> tuple[Tensor, list[int]]:
    """A weight as the eight-bit operators take it: memory and layout."""
    first, second, layout = matrices(weight, gates)
    return _ops.int8_pack.default(first, second, layout), layout


@torch.no_grad()
def matrices(weight: Weight, gates: int) -> tuple[Tensor | None, Tensor, list[int]]:
    """A weight as `int8_pack` takes it: the rows by which low rank reads its input, (rank, cols), those that it, or a
    dense weight, writes with, (gates * rows, columns), and the layout (csrc/README.md)."""
    if isinstance(weight, Tensor):
        layout = [gates, weight.shape[0] // gates, weight.shape[1], 0, *([0, weight.shape[1]] * gates)]
        return None, weight, layout
    lefts: list[list[Tensor]] = [[] for _ in range(gates)]  # of each gate (rows, rank)
    rights: list[list[Tensor]] = [[] for _ in range(gates)]  # (rank, columns)
    for term in weight.term_list():
        left, right = _outer_products(term)
        for i, gate in enumerate(term.gates):
            lefts[gate].append(left[i % len(left)].T)
            rights[gate].append(right[i % len(right)])
    for gate in range(gates):  # one of the sparse residual alone
        if not rights[gate]:
            lefts[gate], rights[gate] = [torch.zeros(weight.rows, 1)], [torch.zeros(1, weight.cols)]
    own = [torch.cat(parts) for parts in rights]
    if all(map(_shares_rows, weight.term_list())):
        first, starts = own[0], [0] * gates
    else:  # one gate's after the other's, each from a multiple of four on
        own_padded = [F.pad(part, (0, 0, 0, -len(part) % 4)) for part in own]
        first = torch.cat(own_padded)
        starts = [sum(len(part) for part in own_padded[:gate]) for gate in range(gates)]
    ranks = [len(part) for part in own]
    second = torch.cat([F.pad(torch.cat(parts, 1), (0, max(ranks) - r)) for parts, r in zip(lefts, ranks, strict=True)])
    spans = [n for pair in zip(starts, ranks, strict=True) for n in pair]
    layout = [gates, weight.rows, weight.cols, len(first), *spans]
    return first, second, layout
