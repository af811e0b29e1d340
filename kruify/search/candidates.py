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
from kruify.conversion.size import FileSize, plan_size
from kruify.errors import FactorSpecError, PlanError
from kruify.progress import Progress
from kruify.training import Recipe

CLEAR_LEAD = 0.1  # of what the best one still lacks to the dense network: a smaller lead is none,
HALVED = 1.0  # and of a lower rate, which leads at first, one that is no larger than what it lacks


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
    """What to try: a plan, the moments that its fit is weighted with (None: unweighted), how its weights are stored
    (None: as they are computed), what was timed under a budget of time (`LatencyPlan.to_json`), and the peak learning
    rate of its training."""

    plan: Plan
    moments: Mapping[str, Moments] | None = None
    dtype: str | None = None
    latency: dict[str, Any] | None = None
    lr: float = Recipe.lr


@dataclass(frozen=True)
class CandidateResult:
    """One candidate after its short training.

    Attributes:
        factors: its specs, each named once.
        metrics: on the validation split.
        lr: peak learning rate of the training.
        dtype: how its weights are stored (None: as they are computed).
    """

    factors: list[str]
    metrics: dict[str, float]
    lr: float
    dtype: str | None = None

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
        more = {"latency": self.candidate.latency, "lr": self.candidate.lr, "candidates": results}
        return {"plan": plan, "weighted": weighted, "dtype": dtype, **more}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], moments: Mapping[str, Moments]) -> Choice:
        """The inverse; TypeError, KeyError, PlanError where `data` holds something else."""
        candidate = Candidate(
            Plan.from_json(parsed(str, data["plan"])),
            moments if data["weighted"] else None,
            parsed(str | None, data["dtype"]),
            parsed(dict[str, Any] | None, data["latency"]),
            parsed(float, data["lr"]),
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
    files: Sequence[FileSize],
    budget: str,
    *,
    moments: Mapping[str, Moments] | None = None,
    searches: Searches | None = None,
    selection: Selection = EVERYTHING,
    planner: Callable[..., Plan] = plan_size,
    first: bool = False,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Candidates under a budget of bytes: what the planner finds (kruify.conversion.size) for each of the files, which
    store the network in different dtypes. One whose dtype cannot meet the budget is left out; where every matrix can
    stay dense the next ones are.

    Low rank of stacked gates at one share was another one, and half low rank, half blocks of entries per gate: the
    former led in no cell of benchmarks/recovery once plans went by the loss, the latter in one of nine.

    Args:
        files: in the order of their candidates.
        first: stop at the first candidate, where none is to be tried.

    Raises:
        PlanError: the budget cannot be met in any dtype.
    """
    options = {"moments": moments, "searches": searches, "progress": progress, **selection.patterns()}
    found: list[Candidate] = []
    for file in files:
        try:
            found.append(Candidate(planner(file, budget, **options), moments, file.dtype))
        except PlanError:
            if not found and file is files[-1]:
                raise
            continue
        if first or not found[-1].plan.items:
            break
    return found


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


def half_and_half(rows: int, cols: int, share: float, scaled: bool = False) -> str | None:
    """A spec of one gate, half of its numbers low rank and half single entries; None where not even rank 1 fits."""
    numbers, one = int(share * rows * cols), rows + cols + scaled
    rank = numbers // (2 * one)
    percent = 100 * (numbers - rank * one) / (rows * cols)
    return f"{rank}*({rows}x1,1x{cols})+sparse:{percent:.8f}%:1" if rank else None


def first_of_the_best(losses: Sequence[float], dense: float, lead: float = CLEAR_LEAD) -> int:
    """The first that is as good as the best but for the share `lead` of what that one lacks to the dense network.

    Single entries and low rates learn faster at first, entries take more time per step (benchmarks/recovery): they
    stand behind in the lists of what is tried, and their lead must be a clear one.
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    least = min(known)
    bound = least + lead * max(0.0, least - dense)
    return next(i for i, loss in enumerate(known) if loss <= bound)
