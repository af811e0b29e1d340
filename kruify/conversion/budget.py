"""A plan from a budget: which structure each gate gets, decided on the weights themselves (and their activations)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kruify.checkpoint import LazyTensor
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import AnyTensor, RecurrentLayer
from kruify.conversion.plan import Plan, Structures, make_plan
from kruify.conversion.planner import Matrices, Searches, plan_budget
from kruify.progress import Progress


def make_budget_plan(
    tensors: Mapping[str, AnyTensor],
    layers: Sequence[RecurrentLayer],
    budget: str | None,
    *,
    input_budget: str | None = None,
    max_error: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    moments: Mapping[str, Moments] | None = None,
    seed: int = 0,
    searches: Searches | None = None,
    progress: Progress | None = None,
) -> Plan:
    """`make_plan` with structures that keep the most (weighted) energy within a budget.

    Args:
        budget: of all recurrent matrices together, "10x", "params=25%", "macs=10%" (conversion.planner.parse_budget).
        input_budget: the same for the input matrices W_ih; None leaves them dense.
        max_error: bound on the relative error of every gate; with no budget, the smallest structures that keep it.
        only, skip, overrides: patterns as in `make_plan`; overrides are set on top of what the budget gave.
        moments: full weight name -> moments of what it is applied to: energy then counts at the output.
        searches: as in `plan_budget`.

    Raises:
        PlanError, TargetMissedError: the budget cannot be met; the text says what can.
    """
    inputs = "auto" if input_budget else None
    everything = make_plan(layers, "auto", inputs, only, skip)
    names = {part: _matrices(everything, tensors, part, moments) for part in ("weight_hh", "weight_ih")}
    scaled = {layer.full_name(weight) for layer, weight, structures in everything.matrices() if structures[0].scaled}
    chosen: dict[str, Structures] = {}
    for part, limit in (("weight_hh", budget), ("weight_ih", input_budget)):
        if names[part]:
            found = plan_budget(
                names[part],
                limit,
                max_error=max_error,
                seed=seed,
                scaled=scaled,
                searches=searches,
                progress=progress,
            )
            chosen |= found.structures
    return make_plan(layers, "auto", inputs, only, skip, overrides, chosen)


def _matrices(
    plan: Plan, tensors: Mapping[str, AnyTensor], part: str, moments: Mapping[str, Moments] | None
) -> Matrices:
    found = {}
    for layer, weight, structures in plan.matrices():
        if not weight.startswith(part):
            continue
        name = layer.full_name(weight)
        tensor = tensors[name]
        known = (moments or {}).get(name)
        covariance = None if known is None else known.weight(layer.bias)
        found[name] = (tensor.load() if isinstance(tensor, LazyTensor) else tensor, len(structures), covariance)
    return found
