"""The eight-bit backend: layers whose weights are stored as integers are computed in integers. CPU, inference."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.computed import computes
from kruify.layers.kernel import form_of, project
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.layers.storage import dense_stored_as
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


class Int8Backend:
    """See the module."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        one = partial(_run_direction, layer.kernel_kind, input.batch_sizes, dense_stored_as(layer, INTEGERS))
        return run_each_direction(layer, input.packed(), state, one)


def run_step(cell: KRUCellBase, x: Tensor, state: State) -> State:
    """One time step of a cell, x (batch, features)."""
    return step(cell, cell.weights(), x, state)


def step(layer: RecurrentLayer | KRUCellBase, weights: Weights, x: Tensor, state: State) -> State:
    """One time step of a cell, or with its weights of a layer and direction; x (batch, features)."""
    sizes = torch.full((1,), x.shape[0], device="cpu")
    return _run_direction(layer.kernel_kind, sizes, dense_stored_as(layer, INTEGERS), weights, x, state, False)[1]


def names_in_integers(layer: RecurrentLayer | KRUCellBase, weights: Weights) -> list[str]:
    """Of what the kernels serve (`serves`) the weights that they multiply with in integers: weight_hh, and weight_ih
    where it is stored so and has no diagonal."""
    return ["weight_hh", *["weight_ih"] * _input_in_integers(weights, dense_stored_as(layer, INTEGERS))]


def serves(layer: RecurrentLayer | KRUCellBase, x: Tensor, state: State = ()) -> bool:
    """Whether the eight-bit kernels compute the layer or cell: its recurrent matrices are stored as integers, dense
    or of low rank (`_is_low_rank`; with a diagonal and a sparse residual, if any), all is float32 on the CPU, and
    nobody asks for derivatives."""
    if traced() or torch.is_autocast_enabled("cpu"):
        return False
    dense, recurrent = dense_stored_as(layer, INTEGERS), layer.recurrent_weights()
    if not all([_is_int8(weight, dense) for weight in recurrent]):
        return False
    if getattr(layer, "proj_size", 0) or layer.kernel_kind in MODRELU or not has_kernel("cpu"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *layer.parameters())):
        return False
    weights: list[Weight] = [x, *dense, *recurrent]
    return all([w.dtype == torch.float32 and w.device.type == "cpu" for w in weights])


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


def _run_direction(
    kind: str,  # a key of kruify.ops.reference.GATES
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    dense: list[Tensor],  # the dense weights that are stored as integers
    weights: Weights,
    data: Tensor,  # (sum of batch_sizes, features)
    state: State,  # each (batch_sizes[0], size)
    reverse: bool,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    w: Any = weights
    arguments, weight_ih = _arguments(kind, dense, weights), w["weight_ih"]
    if arguments.input[0] is None and isinstance(weight_ih, KroneckerMatrix):
        data = project(weight_ih, data, None, kind, precision.FLOAT32)
    elif arguments.input[0] is None:
        data = F.linear(data, weight_ih)
    out, h, c = _ops.int8_recurrence.default(
        *(data, *arguments.input, w["bias_ih"], batch_sizes, state[0], state[1] if kind == "lstm" else None),
        *(*arguments.recurrent, w["bias_hh"], arguments.layout, kind, reverse),
    )
    return out, (h, c) if kind == "lstm" else (h,)


class _Arguments:
    """What the operator is given of the weights of one layer and direction; it is put together once.

    Attributes:
        input: W_ih and its sparse residual; empty where the input's share of the gates is computed before.
        recurrent: W_hh and what is added to its product.
        layout: of what is added.
        lasting: whether they can be kept: no parameter is computed from others, and all count their versions.
    """

    input: tuple[Any, ...] = (None, [], None, None)

    def __init__(self, kind: str, dense: list[Tensor], weights: Weights) -> None:
        w: Any = weights
        weight_ih, weight_hh, gates = w["weight_ih"], w["weight_hh"], GATES[kind]
        ours: dict[str, Weight] = {"weight_hh": weight_hh}
        if _input_in_integers(weights, dense):
            ours["weight_ih"] = weight_ih
            self.input = (*packed(weight_ih, gates), *_beside(weight_ih)[1:])
        diagonal, *residual = _beside(weight_hh)
        self.recurrent = (*packed(weight_hh, gates), [], diagonal, *residual)
        diagonal_gates = () if diagonal is None else weight_hh.diagonal_gates
        rows, cols = weight_hh.shape
        self.layout = Layout(gates, rows // gates, cols, diagonal_gates, ()).encode()

        self.places: list[tuple[dict[str, Any], str, object]] = []  # of all parts of Kronecker matrices, and the parts
        matrices = [m for m in ours.values() if isinstance(m, KroneckerMatrix)]
        for matrix in matrices:
            self.places.append((vars(matrix), "storage", matrix.storage))
            for module in matrix.modules():
                for place in (module._parameters, module._buffers, module._modules):
                    self.places += [(place, name, part) for name, part in place.items()]
        # Kept alive, so that no other takes their places in memory; but not W_hh, by which this is found, nor those of
        # other directions, whose ends would wait for one another.
        self.others = [weight for weight in w.values() if weight is not weight_hh]
        self.factors = [part for _, _, part in self.places if isinstance(part, nn.Parameter)]
        self.dense = [name for name, weight in ours.items() if isinstance(weight, Tensor)]
        made_of = [*self.factors, *(w[name] for name in self.dense)]
        self.end: object = None  # a weak reference to W_hh
        self.lasting = not any(map(computes, matrices)) and not any(t.is_inference() for t in made_of)
        if self.lasting:
            self.stamp = self._stamp(dense, weights)

    def _stamp(self, dense: list[Tensor], weights: Weights) -> object:
        made_of: Any = [*self.factors, *[weights[name] for name in self.dense]]
        weight_ih = weights["weight_ih"]
        ids = [any([weight is weight_ih for weight in dense]), *[id(weight) for weight in weights.values()]]
        return ids, [(t._version, t.data_ptr()) for t in made_of], _ops.fingerprint.default(made_of)

    def hold(self, dense: list[Tensor], weights: Weights) -> bool:
        """Whether the weights still are what these were made of."""
        for place, name, part in self.places:
            if place.get(name) is not part:
                return False
        return self.stamp == self._stamp(dense, weights)


_kept: dict[int, _Arguments] = {}  # by the identity of W_hh, which takes its entry with it


def _arguments(kind: str, dense: list[Tensor], weights: Weights) -> _Arguments:
    """Made anew when a parameter has changed. Changes that count no version (through `.data`) are seen where they reach
    one of the elements, 64 or more, of a parameter that are looked at."""
    place, kept = id(weights["weight_hh"]), _kept  # by a name that is there when a process ends, too
    found = kept.get(place)
    if found is None or not found.hold(dense, weights):
        found = _Arguments(kind, dense, weights)
        if found.lasting:
            found.end = weakref.ref(weights["weight_hh"], lambda _: kept.pop(place, None))
            kept[place] = found
    return found


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
