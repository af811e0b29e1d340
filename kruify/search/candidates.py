"""Candidates: conversions of one network that keep within a budget, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kruify.checkpoint.file_bytes import parsed
from kruify.conversion.budget import Searches, make_budget_plan, parse_budget
from kruify.conversion.calibration import Moments
from kruify.conversion.latency import timed_plans
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import Plan, keeps_scales, make_plan
from kruify.conversion.size import FileSize, largest_within, plan_size
from kruify.errors import FactorSpecError
from kruify.factors import BLOCK_HEIGHTS
from kruify.progress import Progress

NARROW = 16  # columns below which a matrix is small beside the others, and stays dense
CLEAR_LEAD = 0.1  # of what the best one still lacks to the dense network: a smaller lead is none


@dataclass(frozen=True)
class Selection:
    """Which matrices a search may factor.

    Attributes:
        only, skip, overrides: patterns as in `conversion.plan.make_plan`.
        input_factors: spec of the input matrices, where a budget is of the recurrent ones.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    input_factors: str | None = None

    def patterns(self) -> dict[str, Any]:
        """The arguments of a planner."""
        return {"only": self.only, "skip": self.skip, "overrides": self.overrides}

    def plan(self, layers: Sequence[RecurrentLayer], specs: Mapping[str, str | None]) -> Plan | None:
        """The plan of one spec for all gates of each matrix; None where a matrix that may be factored has none.

        Args:
            specs: full weight name -> spec; matrices that are not named stay dense.
        """
        free = make_plan(layers, "auto", "auto", self.only, self.skip).structures()
        chosen = {name: [spec] for name, spec in specs.items() if name in free and spec is not None}
        if not chosen or len(chosen) < sum(name in free for name in specs):
            return None
        try:
            return make_plan(layers, "dense", self.input_factors or "dense", **self.patterns(), chosen=chosen)
        except FactorSpecError:  # an override of one gate does not go with stacked ones
            return None


EVERYTHING = Selection()


@dataclass(frozen=True)
class Candidate:
    """A conversion to try: a plan, the moments that its fit is weighted with (None: unweighted), how its weights are
    stored (None: as they are computed), and what was timed under a budget of time (`LatencyPlan.to_json`)."""

    plan: Plan
    moments: Mapping[str, Moments] | None = None
    dtype: str | None = None
    latency: dict[str, Any] | None = None


@dataclass(frozen=True)
class CandidateResult:
    """One candidate after its short training.

    Attributes:
        factors: its specs, each named once.
        metrics: on the validation split.
    """

    factors: list[str]
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """The candidate that was taken, and the results that decided it (none where nothing had to be tried)."""

    candidate: Candidate
    results: list[CandidateResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All but the moments, which `calibrate` gives again."""
        weighted = self.candidate.moments is not None
        results = [result.to_json() for result in self.results]
        plan, dtype = self.candidate.plan.to_json(), self.candidate.dtype
        latency = self.candidate.latency
        return {"plan": plan, "weighted": weighted, "dtype": dtype, "latency": latency, "candidates": results}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], moments: Mapping[str, Moments]) -> Choice:
        """The inverse; TypeError, KeyError, PlanError where `data` holds something else."""
        plan, dtype, latency = Plan.from_json(parsed(str, data["plan"])), data["dtype"], data.get("latency")
        candidate = Candidate(
            plan,
            moments if data["weighted"] else None,
            None if dtype is None else parsed(str, dtype),
            None if latency is None else parsed(dict[str, Any], latency),
        )
        return cls(candidate, parsed(list[CandidateResult], data["candidates"]))


def make_candidates(
    tensors: Mapping[str, Tensor],
    layers: Sequence[RecurrentLayer],
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    seed: int = 0,
    searches: Searches | None = None,
    dtype: str | None = None,
    selection: Selection = EVERYTHING,
    progress: Progress | None = None,
) -> list[Candidate]:
    """First what keeps the most energy (kruify.conversion.budget), then half low rank, half single entries per gate.

    The second is fitted without weights: weighted with the moments its entries crowd into the columns that the layer
    drives most, and it ends worse.

    Raises:
        PlanError: the budget cannot be met.
    """
    planned = make_budget_plan(
        tensors, layers, budget, moments=moments, seed=seed, searches=searches, progress=progress,
        input_factors=selection.input_factors, **selection.patterns(),
    )  # fmt: skip
    limits = parse_budget(budget)
    # Both parts take one multiply-add per number, so that one share serves both limits.
    share = min(limit for limit in (limits.parameters, limits.multiply_adds) if limit is not None)
    mixed = selection.plan(
        layers,
        {
            layer.full_name(weight): half_and_half(*layer.shape(weight), share, keeps_scales(layer))
            for layer in layers
            for weight in (f"weight_hh{suffix}" for suffix in layer.suffixes)
        },
    )
    return [Candidate(planned, moments, dtype), *([] if mixed is None else [Candidate(mixed, None, dtype)])]


def make_size_candidates(
    file: FileSize,
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    searches: Searches | None = None,
    selection: Selection = EVERYTHING,
    planner: Callable[..., Plan] = plan_size,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Candidates under a budget of bytes: what keeps the most energy (kruify.conversion.size), low rank of stacked
    gates, and half low rank, half blocks of entries per gate, fitted without weights. The last two factor all but
    narrow matrices, at the same share; where every matrix can stay dense there is only the first.

    Raises:
        PlanError: the budget cannot be met.
    """
    options = {"moments": moments, "searches": searches, "progress": progress, **selection.patterns()}
    planned = Candidate(planner(file, budget, **options), moments, file.dtype)
    if not planned.plan.layers:
        return [planned]

    limit, layers = file.limit(budget), file.layers
    stacked = largest_within(limit, file.of, lambda share: stacked_low_rank(layers, share, selection))
    mixed = largest_within(limit, file.of, lambda share: _uniform(layers, _half_blocks, share, selection))
    found = [planned]
    found += [Candidate(stacked, moments, file.dtype)] if stacked and stacked != planned.plan else []
    return [*found, *([Candidate(mixed, None, file.dtype)] if mixed else [])]


def make_latency_candidates(
    file: FileSize,
    dtype: str | None,
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    searches: Searches | None = None,
    selection: Selection = EVERYTHING,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Candidates under a budget of time (kruify.conversion.latency): of those that are fast enough what keeps the most
    energy, and the best of the other kind, low rank of stacked gates or not.

    Raises:
        TargetMissedError: the budget cannot be met.
    """
    options = {"moments": moments, "searches": searches, "progress": progress, **selection.patterns()}
    result = timed_plans(file, budget, **options).checked(budget)
    found = [result.chosen]
    others = [other for other in result.fast_enough if other.stacked != found[0].stacked]
    if found[0].plan.layers and others:
        found.append(max(others, key=lambda other: other.energy))
    return [Candidate(timed.plan, moments, dtype, result.to_json()) for timed in found]


def stacked_low_rank(layers: Sequence[RecurrentLayer], share: float, selection: Selection = EVERYTHING) -> Plan | None:
    """Low rank of stacked gates that keeps this share of the numbers of every matrix that is not narrow; None where
    not even rank 1 does."""
    return _uniform(layers, _stacked_low_rank, share, selection)


def _uniform(
    layers: Sequence[RecurrentLayer],
    spec: Callable[[RecurrentLayer, int, int, float], str | None],
    share: float,
    selection: Selection,
) -> Plan | None:
    specs = {
        layer.full_name(weight): spec(layer, *layer.shape(weight), share)
        for layer in layers
        for weight in layer.weights
        if layer.shape(weight)[1] >= NARROW
    }
    return selection.plan(layers, specs)


def _stacked_low_rank(layer: RecurrentLayer, rows: int, cols: int, share: float) -> str | None:
    """A spec of all gates of one matrix, (rows, cols) each; None where not even rank 1 fits."""
    rows *= len(layer.gates)
    rank = int(share * rows * cols) // (rows + cols + keeps_scales(layer))
    return f"stacked:{rank}*({rows}x1,1x{cols})" if rank else None


def _half_blocks(layer: RecurrentLayer, rows: int, cols: int, share: float) -> str | None:
    return half_and_half(rows, cols, share, keeps_scales(layer), BLOCK_HEIGHTS)


def half_and_half(
    rows: int, cols: int, share: float, scaled: bool = False, heights: Sequence[int] = (1,)
) -> str | None:
    """A spec of one gate, half of its numbers low rank and half entries, in blocks of the first of `heights` that
    divides its rows; None where not even rank 1 fits."""
    numbers, one = int(share * rows * cols), rows + cols + scaled
    rank = numbers // (2 * one)
    percent = 100 * (numbers - rank * one) / (rows * cols)
    height = next(h for h in heights if rows % h == 0)
    return f"{rank}*({rows}x1,1x{cols})+sparse:{percent:.8f}%:{height}" if rank else None


def first_of_the_best(losses: Sequence[float], dense: float) -> int:
    """The first that is as good as the best but for `CLEAR_LEAD` of what that one lacks to the dense network.

    Single entries learn faster at first and take more time per step (benchmarks/recovery): where they stand behind low
    rank in the list of candidates, their lead must be a clear one.
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    least = min(known)
    bound = least + CLEAR_LEAD * max(0.0, least - dense)
    return next(i for i, loss in enumerate(known) if loss <= bound)
