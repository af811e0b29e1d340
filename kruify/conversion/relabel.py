"""Relabelled hidden units: the search (kruify.decomposition.symmetries) for every layer and direction of a plan, the
tensors of a dense state dict in the new order, and the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import AnyTensor, RecurrentLayer
from kruify.conversion.plan import LayerPlan, Plan
from kruify.decomposition import Relabelling, symmetries
from kruify.errors import CorruptError
from kruify.layers.relabel import STEMS, Relabel, Units, odd_gates

SECONDS = 60.0
Progress = Callable[[float, float, str], None]  # seconds gone, seconds in all, what is going on


@dataclass(frozen=True)
class RelabelResult:
    """What became of the units of one layer and direction.

    Attributes:
        name: of its recurrent matrix.
        moved, flipped: units with another place, with another sign.
        energy_before, energy_after: that the structures keep of all gates together; None where the plan came with the
            relabelling and nothing was searched.
        null_before, null_after: the same search on the gates with their entries shuffled.
        gain: what the search found beyond what it finds there.
    """

    name: str
    layer: str
    moved: int
    flipped: int
    energy_before: float | None = None
    energy_after: float | None = None
    null_before: float | None = None
    null_after: float | None = None
    gain: float | None = None


def relabel_plan(
    plan: Plan,
    tensors: Mapping[str, AnyTensor],
    *,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, Relabelling]]:
    """The plan with an order (and signs) of hidden units for every recurrent matrix that keeps more energy with one.

    The energy is the unweighted one of the plan's recurrent matrices; factored input matrices follow. The hidden units
    of a layer with a projection are relabelled, the projected ones are not. Signs change only where the cell allows it
    (kruify.layers.relabel). Matrices that the plan relabels already keep that; stacked gates are left in their order.

    Args:
        tensors: the dense weights by full name.
        seconds: time limit for each layer and direction, half of it for the same search on shuffled entries. A search
            that reaches it depends on the machine's speed; one that ends before depends on the seed alone.

    Returns:
        the plan, and what was found by full weight name, also where it is no gain.

    Raises:
        UsageError: `seconds` is not positive.
        UnsupportedError: a weight holds NaN or infinite numbers.
    """
    found: dict[str, Relabelling] = {}
    layers = []
    for item in plan.layers:
        relabelled = dict(item.relabelled)
        for weight, structures in item.matrices.items():
            if not weight.startswith("weight_hh") or weight in relabelled or structures[0].gates > 1:
                continue
            name = item.layer.full_name(weight)
            tensor = tensors[name]
            dense = tensor.load() if isinstance(tensor, LazyTensor) else tensor
            start = time.monotonic()

            def tell(energy: float, name: str = name, start: float = start) -> None:
                if progress is not None:
                    gone = min(time.monotonic() - start, seconds)
                    progress(gone, seconds, f"relabelling {name}: energy {energy:.4f}")

            search = symmetries(
                dense.reshape(len(structures), item.layer.hidden_size, -1),
                structures,
                odd=odd_gates(item.layer.kind, item.layer.nonlinearity),
                projected=bool(item.layer.proj_size),
                seed=seed,
                seconds=seconds,
                progress=tell,
            )
            found[name] = search
            if search.energy_after > search.energy_before:
                relabelled[weight] = search.units
        layers.append(replace(item, relabelled=relabelled))
    return Plan(layers), found


def relabel_name(weight: str) -> str:
    """The full name of a recurrent matrix -> that of the relabelling beside it."""
    path, dot, own = weight.rpartition(".")
    return f"{path}{dot}relabel{own.removeprefix('weight_hh')}"


def tensors_inside(tensors: dict[str, AnyTensor], plan: Plan) -> dict[str, Relabel]:
    """Puts the weights of relabelled layers into the order of the plan, in place, and the order beside them.

    Returns:
        the relabellings by the full names of their recurrent matrices.
    """
    found = {}
    for layer, weight, relabel in _relabels(plan):
        found[layer.full_name(weight)] = relabel
        for stem, name in _own_tensors(layer, weight, tensors):
            tensor = tensors[name]
            dense = tensor.load() if isinstance(tensor, LazyTensor) else tensor
            tensors[name] = relabel.weight_inside(stem, dense.cpu())
        for entry, value in relabel.state_dict().items():
            tensors[f"{relabel_name(layer.full_name(weight))}.{entry}"] = value
    return found


def tensors_outside(tensors: dict[str, Tensor], plan: Plan) -> None:
    """The inverse of `tensors_inside` on dense weights, in place.

    Raises:
        CorruptError: the tensors hold another relabelling than the plan, or none.
    """
    for layer, weight, relabel in _relabels(plan):
        for entry, wanted in relabel.state_dict().items():
            name = f"{relabel_name(layer.full_name(weight))}.{entry}"
            stored = tensors.pop(name, None)
            if stored is None or stored.tolist() != wanted.tolist():
                raise CorruptError("the units are not in the order of the plan", name, "Convert the source again")
        for stem, name in _own_tensors(layer, weight, tensors):
            tensors[name] = relabel.weight_outside(stem, tensors[name])


def moments_inside(known: Moments, relabel: Relabel) -> Moments:
    """The moments of h as the relabelled matrix meets it."""
    if relabel.projected:
        return known
    return Moments(known.count, relabel.inside(known.total), relabel.inside(relabel.inside(known.outer).T))


def _relabels(plan: Plan) -> Iterator[tuple[RecurrentLayer, str, Relabel]]:
    for item in plan.layers:
        layer = item.layer
        for weight, units in item.relabelled.items():
            yield layer, weight, Relabel(units, layer.kind, layer.nonlinearity, bool(layer.proj_size))


def _own_tensors(layer: RecurrentLayer, weight: str, tensors: Collection[str]) -> list[tuple[str, str]]:
    """(stem, full name) of every weight of the layer and direction that a recurrent matrix belongs to."""
    suffix = weight.removeprefix("weight_hh")
    names = [(stem, layer.full_name(stem + suffix)) for stem in STEMS]
    return [(stem, name) for stem, name in names if name in tensors]


def relabel_account(plan: Plan, searched: Mapping[str, Relabelling] | None = None) -> list[RelabelResult]:
    """One row for every recurrent matrix that is relabelled, or was searched in vain."""
    rows = []
    for item in plan.layers:
        for weight in item.matrices:
            search = (searched or {}).get(item.layer.full_name(weight))
            if weight in item.relabelled or search is not None:
                rows.append(_row(item, weight, search))
    return rows


def _row(item: LayerPlan, weight: str, search: Relabelling | None) -> RelabelResult:
    layer: RecurrentLayer = item.layer
    units: Units = item.relabelled.get(weight, ())
    result = RelabelResult(
        layer.full_name(weight),
        layer.name,
        moved=sum(abs(unit) != place for place, unit in enumerate(units, 1)),
        flipped=sum(unit < 0 for unit in units),
    )
    if search is None:
        return result
    return replace(
        result,
        energy_before=search.energy_before,
        energy_after=search.energy_after,
        null_before=search.null_before,
        null_after=search.null_after,
        gain=search.gain,
    )
