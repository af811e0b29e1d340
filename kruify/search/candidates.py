"""Candidates: conversions of one network that keep within a budget, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kruify.conversion.budget import Searches, make_budget_plan, parse_budget
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import Plan, keeps_scales, make_plan
from kruify.training.resume import parsed

CLEAR_LEAD = 0.1  # of what the best one still lacks to the dense network: a smaller lead is none


@dataclass(frozen=True)
class Candidate:
    """A conversion to try: a plan, and the moments that its fit is weighted with (None: unweighted)."""

    plan: Plan
    moments: Mapping[str, Moments] | None = None


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
        return {"plan": self.candidate.plan.to_json(), "weighted": weighted, "candidates": results}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], moments: Mapping[str, Moments]) -> Choice:
        """The inverse; TypeError, KeyError, PlanError where `data` holds something else."""
        candidate = Candidate(Plan.from_json(parsed(str, data["plan"])), moments if data["weighted"] else None)
        return cls(candidate, parsed(list[CandidateResult], data["candidates"]))


def make_candidates(
    tensors: Mapping[str, Tensor],
    layers: Sequence[RecurrentLayer],
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    seed: int = 0,
    searches: Searches | None = None,
) -> list[Candidate]:
    """First what keeps the most energy (kruify.conversion.budget), then half low rank, half single entries per gate.

    The second is fitted without weights: weighted with the moments its entries crowd into the columns that the layer
    drives most, and it ends worse.

    Raises:
        PlanError: the budget cannot be met.
    """
    planned = make_budget_plan(tensors, layers, budget, moments=moments, seed=seed, searches=searches)
    limits = parse_budget(budget)
    # Both parts take one multiply-add per number, so that one share serves both limits.
    share = min(limit for limit in (limits.parameters, limits.multiply_adds) if limit is not None)
    specs = {
        layer.full_name(weight): spec
        for layer in layers
        for weight in (f"weight_hh{suffix}" for suffix in layer.suffixes)
        if (spec := half_and_half(*layer.shape(weight), share, keeps_scales(layer))) is not None
    }
    mixed = make_plan(layers, "dense", overrides=specs)
    complete = sum(len(item.matrices) for item in mixed.layers) == sum(len(layer.suffixes) for layer in layers)
    return [Candidate(planned, moments), *([Candidate(mixed)] if complete else [])]


def half_and_half(rows: int, cols: int, share: float, scaled: bool = False) -> str | None:
    """A spec of one gate, half of its numbers low rank and half single entries; None where not even rank 1 fits."""
    numbers, one = int(share * rows * cols), rows + cols + scaled
    rank = numbers // (2 * one)
    percent = 100 * (numbers - rank * one) / (rows * cols)
    return f"{rank}*({rows}x1,1x{cols})+sparse:{percent:.8f}%:1" if rank else None


def first_of_the_best(losses: Sequence[float], dense: float) -> int:
    """The first that is as good as the best but for `CLEAR_LEAD` of what that one lacks to the dense network.

    Single entries learn faster at first and take more time per step (benchmarks/recovery): where they stand behind low
    rank in the list of candidates, their lead must be a clear one.
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    least = min(known)
    bound = least + CLEAR_LEAD * max(0.0, least - dense)
    return next(i for i, loss in enumerate(known) if loss <= bound)
