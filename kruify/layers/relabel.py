"""Hidden units that a layer keeps in an order and with signs of its own, while the outside sees those of the dense one.

Any order of the units gives the same function: W_g -> P W_g P^T for every gate g with the same P, and P on the rows of
W_ih and the biases. A sign s of a unit may change wherever the state that carries it comes out of an odd function:

    RNN, tanh   h = tanh(a)                    the rows of its one gate
    LSTM        c = f c + i tanh(g), h = o tanh(c)     the rows of g; i, f, o stay, c and h change together
    GRU         h = (1 - z) tanh(n) + z h      the rows of n, b_hn inside r * (...) included; r, z stay

and, for each of them, the columns of all gates that read h. relu is not odd. With a projection h = W_hr (o tanh(c)) the
hidden units are those of c and of the columns of W_hr; the projected h is not relabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.steps import GATES, State

if TYPE_CHECKING:
    from kruify.layers.base import KRUBase
    from kruify.layers.cells import KRUCellBase

STEMS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
Units = tuple[int, ...]  # inside unit i is outside unit |units[i]|, counted from 1, with the sign of units[i]


def odd_gates(kind: str, nonlinearity: str | None) -> tuple[int, ...] | None:
    """The gates whose rows change sign with a unit; None where no unit may change its sign, or that is not known."""
    if kind == "rnn":
        return (0,) if nonlinearity == "tanh" else None
    return (GATES[kind].index("g" if kind == "lstm" else "n"),)


def is_relabelling(units: Sequence[int], hidden: int) -> bool:
    """Whether every unit from 1 to `hidden` is there once, with either sign."""
    return sorted(abs(unit) for unit in units) == list(range(1, hidden + 1))


class Relabel(nn.Module):
    """The relabelling of one layer and direction.

    Attributes:
        permutation: int64 buffer (hidden,); inside unit i is outside unit permutation[i] (from 0).
        signs: int8 buffer (hidden,), +-1, of the inside units.

    Raises:
        UsageError: `units` is no relabelling, or changes a sign where the cell does not allow it.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(
        self,
        units: Sequence[int],
        kind: str,
        nonlinearity: str | None = None,
        projected: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gates, self.odd, self.projected = len(GATES[kind]), odd_gates(kind, nonlinearity), projected
        if not is_relabelling(units, len(units)):
            raise UsageError(f"a relabelling names each of {len(units)} units once, got {list(units)[:8]}...")
        if self.odd is None and min(units) < 0:
            raise UsageError(
                f"the units of a {nonlinearity or 'plain'} RNN may be renumbered, but not change their sign"
            )
        numbers = torch.tensor(units, device=device)
        self.register_buffer("permutation", numbers.abs() - 1)
        self.register_buffer("signs", numbers.sign().to(torch.int8))

    @property
    def units(self) -> Units:
        return tuple(((self.permutation + 1) * self.signs).tolist())

    def inside(self, x: Tensor) -> Tensor:  # (..., hidden) -> (..., hidden)
        """The dense layer's units -> those of the matrices."""
        return x.index_select(-1, self.permutation) * self.signs

    def outside(self, x: Tensor) -> Tensor:  # (..., hidden) -> (..., hidden)
        """The inverse of `inside`."""
        inverse = self.permutation.argsort()  # a second gather is several times faster than an index_copy
        return x.index_select(-1, inverse) * self.signs[inverse]

    def state_inside(self, state: State) -> State:
        """(h,) or (h, c), each (batch, size); a projected h stays as it is."""
        return (state[0], self.inside(state[1])) if self.projected else tuple(map(self.inside, state))

    def state_outside(self, state: State) -> State:
        return (state[0], self.outside(state[1])) if self.projected else tuple(map(self.outside, state))

    def output_outside(self, output: Tensor) -> Tensor:  # (..., size)
        return output if self.projected else self.outside(output)

    def weight_inside(self, stem: str, weight: Tensor) -> Tensor:
        """A dense weight or bias of the dense layer as it stands in this one.

        Args:
            stem: "weight_ih" (gates * hidden, inputs), "weight_hh" (gates * hidden, hidden or projection), "bias_ih",
                "bias_hh" (gates * hidden,) or "weight_hr" (projection, hidden).
        """
        return self._relabelled(stem, weight, self.permutation, self.signs)

    def weight_outside(self, stem: str, weight: Tensor) -> Tensor:
        """The inverse of `weight_inside`, exact."""
        inverse = self.permutation.argsort()
        return self._relabelled(stem, weight, inverse, self.signs[inverse])

    def _relabelled(self, stem: str, weight: Tensor, permutation: Tensor, signs: Tensor) -> Tensor:
        if stem == "weight_hr":
            return weight.index_select(1, permutation) * signs
        hidden = len(permutation)
        gates = weight.reshape(self.gates, hidden, -1).index_select(1, permutation)
        if stem == "weight_hh" and not self.projected:
            gates = gates.index_select(2, permutation) * signs
        rows = torch.ones(self.gates, hidden, 1, dtype=signs.dtype, device=signs.device)
        for gate in self.odd or ():
            rows[gate, :, 0] = signs
        return (gates * rows).reshape(weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch's; numbers that are no relabelling are an error of the file."""
        errors: list[str] = rest[-1]
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        permutation, signs = state_dict.get(f"{prefix}permutation"), state_dict.get(f"{prefix}signs")
        if permutation is None or signs is None or len(errors) > before:
            return
        if sorted(permutation.tolist()) != list(range(len(permutation))) or not set(signs.tolist()) <= {-1, 1}:
            errors.append(f"{prefix}permutation and signs are no relabelling of {len(permutation)} units")
        elif self.odd is None and -1 in signs.tolist():
            errors.append(f"{prefix}signs: this layer's units may not change their sign")

    def extra_repr(self) -> str:
        moved = int((self.permutation != torch.arange(len(self.permutation), device=self.permutation.device)).sum())
        return f"{len(self.permutation)} units, {moved} moved, {int((self.signs < 0).sum())} flipped"


def relabel_of(layer: KRUBase | KRUCellBase, suffix: str) -> Relabel | None:
    """The relabelling of one layer and direction; None where the units are those of the dense layer."""
    found = getattr(layer, f"relabel{suffix}", None) if layer.relabelled else None
    return found if isinstance(found, Relabel) else None


def set_relabel(layer: KRUBase | KRUCellBase, suffix: str, units: Sequence[int]) -> None:
    """Says that the matrices of one layer and direction are those of relabelled units; the numbers are left alone.

    Raises:
        UsageError: `units` is no relabelling of the hidden units, or changes a sign where the cell does not allow it.
    """
    if len(units) != layer.hidden_size:
        raise UsageError(f"the layer has {layer.hidden_size} hidden units, the relabelling {len(units)}")
    projected = bool(getattr(layer, "proj_size", 0))
    device = next(layer.parameters()).device
    layer.add_module(f"relabel{suffix}", Relabel(units, layer.kind, layer.nonlinearity, projected, device))
    layer.relabelled = True


def dense_weight(layer: KRUBase | KRUCellBase, name: str) -> Tensor:
    """The dense weight or bias `name`, such as "weight_hh_l0", of the function that the layer computes: factors
    multiplied out, units as the outside sees them. Differentiable."""
    stem = next(stem for stem in STEMS if name.startswith(stem))
    value = getattr(layer, name)
    weight: Tensor = value.to_dense() if isinstance(value, KroneckerMatrix) else value
    relabel = relabel_of(layer, name.removeprefix(stem))
    return weight if relabel is None else relabel.weight_outside(stem, weight)


def weight_inside(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The dense weight of the full name `name`, such as "encoder.weight_hh_l0", as the layer there would hold it."""
    path, _, own = name.rpartition(".")
    stem = next((stem for stem in STEMS if own.startswith(stem)), "")
    relabel = getattr(model.get_submodule(path), f"relabel{own.removeprefix(stem)}", None) if stem else None
    return relabel.weight_inside(stem, weight) if isinstance(relabel, Relabel) else weight
