"""The eight-bit backend: layers whose weights are stored as int8 are computed in integers. CPU, inference."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.computed import computes
from kruify.layers.kernel import form_of, parameters_of
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.layers.storage import dense_stored_as
from kruify.ops import Layout, has_kernel, precision
from kruify.ops.functions import traced
from kruify.ops.kron_matmul import multiply
from kruify.ops.reference import GATES, MODRELU, State

if TYPE_CHECKING:
    from kruify.layers.cells import KRUCellBase
    from kruify.layers.recurrent import RecurrentLayer

_ops = torch.ops.kruify
Weight = KroneckerMatrix | Tensor
_DEPTH = 1 << 16  # columns whose products an int32 can add up: kInt8Depth in csrc/int8.h


class Int8Backend:
    """See the module."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        one = partial(_run_direction, layer.kernel_kind, input.batch_sizes, dense_stored_as(layer, "int8"))
        return run_each_direction(layer, input.packed(), state, one)


def run_step(cell: KRUCellBase, x: Tensor, state: State) -> State:
    """One time step of a cell, x (batch, features)."""
    return step(cell, cell.weights(), x, state)


def step(layer: RecurrentLayer | KRUCellBase, weights: Weights, x: Tensor, state: State) -> State:
    """One time step of a cell, or with its weights of a layer and direction; x (batch, features)."""
    sizes = torch.full((1,), x.shape[0], device="cpu")
    return _run_direction(layer.kernel_kind, sizes, dense_stored_as(layer, "int8"), weights, x, state, False)[1]


def names_in_integers(layer: RecurrentLayer | KRUCellBase, weights: Weights) -> list[str]:
    """Of what the kernels serve (`serves`) the weights that they multiply with in integers: weight_hh, and weight_ih
    where it is stored so and has no diagonal."""
    inputs: Any = weights["weight_ih"]
    diagonal = inputs.parts_beside_terms()[0] if isinstance(inputs, KroneckerMatrix) else None
    own = _is_int8(inputs, dense_stored_as(layer, "int8")) and diagonal is None
    return ["weight_hh", *["weight_ih"] * own]


def serves(layer: RecurrentLayer | KRUCellBase, x: Tensor, state: State = ()) -> bool:
    """Whether the eight-bit kernels compute the layer or cell: its recurrent matrices are stored as int8, dense or of
    low rank (with a diagonal and a sparse residual, if any), all is float32 on the CPU, and nobody asks for
    derivatives."""
    dense = dense_stored_as(layer, "int8")
    if not all(_is_int8(weight, dense) for weight in layer.recurrent_weights()):
        return False
    if getattr(layer, "proj_size", 0) or layer.kernel_kind in MODRELU or not x.is_cpu or not has_kernel("cpu"):
        return False
    if traced() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *layer.parameters())):
        return False
    weights: list[Weight] = [x, *dense, *layer.recurrent_weights()]
    return all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)


def _is_int8(weight: Weight | None, dense: list[Tensor]) -> bool:
    """Whether the kernels take the weight in eight bits; `dense` are the dense ones that are stored so."""
    if not isinstance(weight, KroneckerMatrix):
        return any(weight is stored and weight.shape[1] <= _DEPTH for stored in dense)
    if weight.storage != "int8":
        return False
    terms = weight.term_list()
    if weight.cols > _DEPTH or sum(term.term.rank for term in terms) > _DEPTH:
        return False
    covered = {gate for term in terms for gate in term.gates}
    return all(_outer(term) is not None for term in terms) and covered == set(range(weight.gates))


def _outer(term: KroneckerTerm) -> tuple[int, int] | None:
    """Which factors of a term of outer products are its columns and its rows; None for any other term."""
    for left, right in ((0, 1), (1, 0)):
        if len(term.shapes) == 2 and term.shapes[left][1] == term.shapes[right][0] == 1:
            return None if term.stacked and left else (left, right)
    return None


def _run_direction(
    kind: str,  # a key of kruify.ops.reference.GATES
    batch_sizes: Tensor,  # (steps,) int64 on the CPU, descending
    dense: list[Tensor],  # the dense weights that are stored as int8
    weights: Weights,
    data: Tensor,  # (sum of batch_sizes, features)
    state: State,  # each (batch_sizes[0], size)
    reverse: bool,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    w: Any = weights
    weight_ih, weight_hh, gates = w["weight_ih"], w["weight_hh"], GATES[kind]
    first: tuple[Any, ...] = (None, [], None, None)  # data is the input's share of the gates
    diagonal, *residual = weight_ih.parts_beside_terms() if isinstance(weight_ih, KroneckerMatrix) else (None,) * 3
    if _is_int8(weight_ih, dense) and diagonal is None:
        first = (*packed(weight_ih, gates), *residual)
    elif isinstance(weight_ih, KroneckerMatrix):
        form, rest = form_of(weight_ih), weight_ih.parts_beside_terms()
        data = multiply(form.assembly, precision.FLOAT32, data, None, rest, parameters_of(weight_ih, form))
    else:
        data = F.linear(data, weight_ih)
    kronecker = isinstance(weight_hh, KroneckerMatrix)
    rest = weight_hh.parts_beside_terms() if kronecker else (None, None, None)
    hidden, diagonal_gates = state[0].shape[1], weight_hh.diagonal_gates if kronecker else ()
    out, h, c = _ops.int8_recurrence.default(
        *(data, *first, w["bias_ih"], batch_sizes, state[0], state[1] if kind == "lstm" else None),
        *packed(weight_hh, gates),
        *([], *rest, w["bias_hh"], Layout(gates, hidden, hidden, diagonal_gates, ()).encode(), kind, reverse),
    )
    return out, (h, c) if kind == "lstm" else (h,)


@dataclass(frozen=True)
class _Packed:
    memory: Tensor
    layout: list[int]
    made_of: list[Tensor]  # kept alive, so that no other tensor takes their places in memory
    stamp: object


_kept: MutableMapping[Weight, _Packed] = WeakIdKeyDictionary()


def packed(weight: Weight, gates: int) -> tuple[Tensor, list[int]]:
    """A weight as the eight-bit operators take it: memory and layout. They are kept while its parameters are what they
    were. Changes that count no version (through `.data`) are seen where they reach one of the elements, 64 or more, of
    a parameter that are looked at.
    """
    made_of: list[Tensor] = [weight] if isinstance(weight, Tensor) else []
    if isinstance(weight, KroneckerMatrix):
        for term in weight.term_list():
            made_of += [p for p in (*term.factors._parameters.values(), term.scale) if p is not None]
        if computes(weight):  # from a mask, say, that may change
            return _pack(weight, gates)
    if any(t.is_inference() for t in made_of):  # counts no versions
        return _pack(weight, gates)
    counts = tuple((id(t), t.data_ptr(), t._version) for t in made_of)
    stamp = (counts, _ops.fingerprint.default(made_of))
    kept = _kept.get(weight)
    if kept is None or kept.stamp != stamp:
        kept = _kept[weight] = _Packed(*_pack(weight, gates), [t for t in made_of if t is not weight], stamp)
    return kept.memory, kept.layout


def _pack(weight: Weight, gates: int) -> tuple[Tensor, list[int]]:
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
        places = _outer(term)
        assert places is not None
        factors, scale = term.held()
        left, right = factors[places[0]].squeeze(3), factors[places[1]].squeeze(2)
        if scale is not None and term.stacked:
            left = left * scale[..., None]
        elif scale is not None:
            right = right * scale[..., None]
        for i, gate in enumerate(term.gates):
            lefts[gate].append(left[i].T)
            rights[gate].append(right[0 if term.stacked else i])
    own = [torch.cat(parts) for parts in rights]
    if any(term.stacked for term in weight.term_list()):  # then all are
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
