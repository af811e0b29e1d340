"""A plan from a latency: the recurrent layers take so many times less time than torch's dense ones on this machine, and
keep the most.

A plan is timed as the layers that it gives, stored and computed as those of its file will be, in turns with the dense
layers: one sequence (`BATCH`) of `STEPS` steps, one thread, the best of many runs, which a busy machine changes least.
Four kinds of plans are tried in the sizes around the bound: of all matrices or of the recurrent ones alone, low rank of
stacked gates, which takes the least time for its multiply-adds, or what keeps the most energy for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kruify.checkpoint.tensors import ties
from kruify.conversion.budget import BudgetPlan, Matrices, Searches, gates_of, matrices_of, parse_budget, plan_budget
from kruify.conversion.build import build_dense, build_layer
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import Plan, divided, make_plan
from kruify.conversion.size import FileSize
from kruify.conversion.storing import planned, storage_for, store_as, with_dense
from kruify.errors import FactorSpecError, PlanError, TargetMissedError
from kruify.factors import Structure, Term
from kruify.layers.storage import within
from kruify.layers.timing import STEPS, Run, interleaved, layer_run, together, torch_threads
from kruify.progress import Progress

BATCH, THREADS = 1, 1
SECONDS = 0.3  # spent on each plan and the dense layers beside it
LEAST_SHARE = 2**-8  # of the multiply-adds of the dense matrices
HALVINGS = 5  # of the eight powers of two between: sizes that differ by a fifth
FEW_HALVINGS = 3  # of three of them, by a third: these plans take long to make


@dataclass(frozen=True)
class TimedPlan:
    """A plan and what is known of it.

    Attributes:
        milliseconds: of its layers, the best of many runs.
        energy: share that it keeps of the (weighted) energy of all matrices that may be factored.
        stacked: whether it is low rank of stacked gates.
    """

    plan: Plan
    milliseconds: float
    energy: float
    stacked: bool

    @property
    def factors(self) -> list[str]:
        """Its specs, each named once."""
        return [*dict.fromkeys(str(s) for _, _, structures in self.plan.matrices() for s in structures)]


@dataclass(frozen=True)
class LatencyPlan:
    """The plans that were timed, and the one that keeps the most of those that are `wanted` times faster than dense."""

    wanted: float
    dense_milliseconds: float
    timed: list[TimedPlan]

    @property
    def fast_enough(self) -> list[TimedPlan]:
        return [found for found in self.timed if self.ratio(found) >= self.wanted]

    @property
    def chosen(self) -> TimedPlan:
        return max(self.fast_enough, key=lambda found: found.energy)

    def checked(self, budget: str) -> LatencyPlan:
        """Itself.

        Raises:
            TargetMissedError: no plan is fast enough for the budget; the text names the fastest.
        """
        if self.fast_enough:
            return self
        fastest = max(self.timed, key=self.ratio)
        raise TargetMissedError(
            f"the fastest plan that was found takes {self.ratio(fastest):.2f}x less time than the dense layers "
            f"({', '.join(fastest.factors) or 'dense'})",
            f"budget {budget}",
            f"Allow latency={max(1.0, 0.95 * self.ratio(fastest)):.2f}x, or store the weights as int8",
        )

    def ratio(self, found: TimedPlan) -> float:
        """How many times less time than the dense layers it takes."""
        return self.dense_milliseconds / found.milliseconds

    def to_json(self) -> dict[str, Any]:
        """What was asked for, how it was measured, and what was found."""

        def entry(found: TimedPlan) -> dict[str, Any]:
            return {"ms": found.milliseconds, "ratio": self.ratio(found), "energy": found.energy}

        how = {"batch": BATCH, "steps": STEPS, "threads": THREADS, "dense_ms": self.dense_milliseconds}
        candidates = [{"factors": found.factors, **entry(found)} for found in self.timed]
        return {"wanted": self.wanted, **entry(self.chosen), **how, "candidates": candidates}


def timed_plans(
    file: FileSize,
    budget: str,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    moments: Mapping[str, Moments] | None = None,
    searches: Searches | None = None,
    progress: Progress | None = None,
) -> LatencyPlan:
    """Plans around a latency, fast enough or not.

    Args:
        file: the network, and how its weights will be stored.
        budget: "latency=3x": a third of the time of the dense layers (`parse_budget`).
        only, skip, overrides, moments, searches: as in `conversion.size.plan_size`.
    """
    share = parse_budget(budget).latency
    assert share is not None
    everything = make_plan(file.layers, "auto", "auto", only, skip)
    kinds = _Kinds(file, everything, moments, {} if searches is None else searches, divided(file.layers, overrides))
    clock, timed = _Clock(file), dict[str, TimedPlan]()
    gone, steps = 0, 2 * (HALVINGS + FEW_HALVINGS + 2)

    def tell(count: int) -> None:
        """Of the steps of the four searches so many are over, or need not be gone."""
        nonlocal gone
        gone += count
        if progress is not None:
            progress(gone, steps, "timing plans")

    def fast_enough(found: BudgetPlan | None, stacked: bool) -> bool | None:
        """Of a plan that is new, once timed; None where there is none so small."""
        if found is None:
            return None
        chosen = {**found.structures}
        chosen |= {name: chosen[first] for name, first in kinds.second.items() if first in chosen}
        try:
            plan = make_plan(file.layers, "dense", "dense", only, skip, overrides, chosen)
        except FactorSpecError:  # an override of one gate does not go with stacked ones
            return None
        key = plan.to_json()
        if key not in timed:
            timed[key] = TimedPlan(plan, clock.time(plan), kinds.kept(found), stacked)
        return timed[key].milliseconds <= share * clock.dense

    def largest(stacked: bool, inputs: bool, low: float, high: float, halvings: int) -> float | None:
        """The largest share between that is fast enough; None where `low` is not."""
        if fast_enough(kinds.plan(stacked, inputs, low), stacked) is False:
            tell(1 + halvings)
            return None
        tell(1)
        for _ in range(halvings):
            middle = (low * high) ** 0.5
            slow = fast_enough(kinds.plan(stacked, inputs, middle), stacked) is False
            low, high = (low, middle) if slow else (middle, high)
            tell(1)
        return low

    if not fast_enough(BudgetPlan({}, {}), False):
        for inputs in (True, False):
            most = largest(True, inputs, LEAST_SHARE, 1.0, HALVINGS)
            if most is None:  # nothing is faster at as many multiply-adds
                tell(1 + FEW_HALVINGS)
            else:
                largest(False, inputs, most / 8, most, FEW_HALVINGS)
    return LatencyPlan(1 / share, clock.dense, [*timed.values()])


class _Kinds:
    """Plans of one kind and size, and the energy that they keep."""

    def __init__(
        self,
        file: FileSize,
        everything: Plan,
        moments: Mapping[str, Moments] | None,
        searches: Searches,
        apart: Collection[str],
    ) -> None:
        tensors = file.tensors_in_float32
        self.second = ties(tensors)
        self.seed, self.searches, self.apart = file.seed, searches, apart
        self.recurrent: Matrices = matrices_of(everything, tensors, "weight_hh", moments, self.second)
        self.all: Matrices = {**self.recurrent, **matrices_of(everything, tensors, "weight_ih", moments, self.second)}
        self.scaled = {layer.full_name(weight) for layer, weight, found in everything.matrices() if found[0].scaled}
        self.stacks = gates_of(self.all, self.seed, self.scaled, searches, stacked=True)
        gates = gates_of(self.all, self.seed, self.scaled, searches)
        self._scales = {(gate.name, gate.number): gate.scale for gate in (*gates, *self.stacks)}
        self._whole = {name: sum(gate.scale for gate in gates if gate.name == name) for name in self.all}

    def plan(self, stacked: bool, inputs: bool, share: float) -> BudgetPlan | None:
        """At most this share of the multiply-adds of the matrices; None where there is nothing so small."""
        matrices = self.all if inputs else self.recurrent
        if stacked:
            return self._low_rank(matrices, share)
        budget = f"macs={100 * share:.8f}%"
        try:
            return plan_budget(
                matrices, budget, seed=self.seed, scaled=self.scaled, apart=self.apart, searches=self.searches
            )
        except PlanError:
            return None

    def _low_rank(self, matrices: Matrices, share: float) -> BudgetPlan | None:
        found = BudgetPlan({}, {})
        for stack in self.stacks:
            search = stack.search
            rank = int(share * stack.dense) // (search.rows + search.cols)
            if stack.name not in matrices or rank >= min(search.rows, search.cols):
                continue
            if not rank:
                return None
            term = Term(search.low_rank(), rank)
            structure = Structure(search.rows, search.cols, (term,), scaled=search.scaled, gates=search.gates)
            found.structures[stack.name] = (structure,)
            found.energy[stack.name] = (search.spectrum_energy(term.factors, rank),)
        return found if found.structures else None

    def kept(self, found: BudgetPlan) -> float:
        """The share of the energy of all matrices that may be factored, those that stay dense among them."""
        lost = 0.0
        for name, energies in found.energy.items():
            numbers = [-1] if (name, -1) in self._scales and len(energies) == 1 else range(len(energies))
            lost += sum(self._scales[name, n] * (1 - energy) for n, energy in zip(numbers, energies, strict=True))
        return 1 - lost / max(sum(self._whole.values()), 1e-300)


class _Clock:
    """Times the recurrent layers of plans for one network, beside the dense ones.

    Attributes:
        dense: milliseconds of the dense layers, the best of all runs.
    """

    def __init__(self, file: FileSize) -> None:
        self.file, self.dense = file, math.inf
        self._dense = together([_run(layer, build_dense(layer)) for layer in file.layers])
        self._best([self._dense], 4 * SECONDS)  # everything is compared with it

    def time(self, plan: Plan) -> float:
        """Milliseconds of the layers of a plan."""
        file = self.file
        if file.dtype != "float32":
            plan = with_dense(plan, file.layers)
        storage = storage_for(planned(file.tensors_in_float32, plan), plan, file.dtype, file.keep)
        items = {item.layer.name: item for item in plan.layers}
        runs = []
        for layer in file.layers:
            item = items.get(layer.name)
            module: nn.Module = build_dense(layer) if item is None else build_layer(item)
            runs.append(_run(layer, store_as(module, within(storage, layer.name, module))))
        return self._best([together(runs), self._dense], SECONDS)

    def _best(self, runs: list[Run], seconds: float) -> float:
        """Milliseconds of the first; the last is of the dense layers."""
        with torch_threads(THREADS), torch.inference_mode():
            found = [1e3 * min(samples) for samples in interleaved(runs, seconds)]
        self.dense = min(self.dense, found[-1])
        return found[0]


def _run(layer: RecurrentLayer, module: nn.Module) -> Run:
    first = bool(layer.batch_first)
    return layer_run(module.eval(), layer.input_size, BATCH, batch_first=first, cell=layer.cell)
