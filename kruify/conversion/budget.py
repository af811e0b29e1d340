"""A plan from a budget: which structure each gate of each matrix gets, so that all together keep the most energy.

Decided on the weights themselves, and where there are moments on what they are applied to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import AnyTensor, RecurrentLayer
from kruify.conversion.plan import Plan, Structures, divided, make_plan
from kruify.decomposition.fitting import check, metric_of
from kruify.decomposition.structure_search import ScoredStructure, StructureSearch
from kruify.errors import PlanError, TargetMissedError
from kruify.factors import Structure, Term
from kruify.progress import Progress

Matrices = Mapping[str, tuple[Tensor, int, Tensor | None]]  # name -> (gates*rows, cols) weight, gates, covariance
Searches = dict[tuple[str, int], StructureSearch]  # (name, gate, -1 for all stacked) -> what was learnt of it
LEVELS = (0.25, 0.5, 1.0, 1.75, 3.0)  # budgets tried for one gate, relative to an even share
MIXTURES_LIMIT = 2  # kinds of sums that are tried at all levels: those that keep the most at an even share
ERROR_LEVELS = tuple(2 ** (-k / 2) for k in range(20, -1, -1))  # shares of the dense size tried for an error bound
FINER_FROM = 1 << 12  # numbers of a gate from which one rank more or less is no matter of the file's header
PRICES = (0.0, 0.25, 0.5, 0.75, 1.0)  # weight of multiply-adds against parameters in the price of a candidate
PAIRS_LIMIT = 1 << 11  # candidates of all gates together up to which pairs of exchanges are looked at

BUDGET_GRAMMAR = "'10x', 'params=25%', 'macs=10%', 'params=8x,macs=50%', 'size=8x', 'size=600kB' or 'latency=3x'"
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """What may be kept, None where unlimited.

    Attributes:
        parameters, multiply_adds: shares of the dense matrices.
        size: of the file of the whole network, a share of the bytes of the source's weights; or
        bytes: how many.
        latency: share of the time that the dense recurrent layers take.
    """

    parameters: float | None = None
    multiply_adds: float | None = None
    size: float | None = None
    bytes: int | None = None
    latency: float | None = None

    @property
    def of_file(self) -> bool:
        """Whether it is one of bytes (`conversion.size`)."""
        return self.size is not None or self.bytes is not None

    @property
    def of_network(self) -> bool:
        """Whether it is one of the whole network, bytes or time, not of its recurrent matrices."""
        return self.of_file or self.latency is not None


@dataclass(frozen=True)
class BudgetPlan:
    """What `plan_budget` decided.

    Attributes:
        structures: name -> one structure per gate, or one of all gates stacked.
        energy: name -> the (weighted) share of its energy that each structure is estimated to keep.
    """

    structures: dict[str, Structures]
    energy: dict[str, tuple[float, ...]]

    @property
    def parameters(self) -> int:
        """Of all matrices together, after."""
        return sum(s.parameters for s in self._all())

    @property
    def multiply_adds(self) -> int:
        """Per step, of all matrices together, after."""
        return sum(s.multiply_adds for s in self._all())

    @property
    def dense_parameters(self) -> int:
        """Before; a dense matrix takes as many multiply-adds."""
        return sum(s.dense_parameters for s in self._all())

    def _all(self) -> list[Structure]:
        return [s for structures in self.structures.values() for s in structures]


_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_CLAUSE = re.compile(rf"(?:(params|macs|size|latency)=)?{_NUMBER}(x|%)")
_BYTES = re.compile(rf"size={_NUMBER}({'|'.join(UNITS)}|)")


def parse_budget(text: str) -> Budget:
    """Reads '10x' (a tenth of the parameters), 'params=25%', 'macs=10%' and combinations of both joined by commas;
    'size=8x' or 'size=600kB' (`UNITS`) of the file of the whole network; 'latency=3x' of the time of its layers.

    Raises:
        PlanError: not in that form, named twice, not between 0 and 100 %, or a size or latency beside other limits.
    """
    found: dict[str, float] = {}
    clauses = re.sub(r"\s+", "", text).lower().split(",")
    for clause in clauses:
        match, absolute = _CLAUSE.fullmatch(clause), _BYTES.fullmatch(clause)
        if clause.startswith(("size=", "latency=")) and len(clauses) > 1:
            raise PlanError("a budget of bytes or of time stands alone", text, "Give --budget one of its limits")
        if absolute is not None:
            return Budget(bytes=int(float(absolute[1]) * UNITS[absolute[2] or "b"]))
        if match is None:
            raise PlanError(f"'{clause}' is not a budget", text, f"Write for example {BUDGET_GRAMMAR}")
        key, number = match[1] or "params", float(match[2])
        if key in found:
            raise PlanError(f"the budget names {key} twice", text)
        if number == 0 or (match[3] == "x" and number < 1) or (match[3] == "%" and number > 100):
            raise PlanError(f"'{clause}' is not a reduction", text, "Give a factor of 1x or more, or up to 100%")
        found[key] = 1 / number if match[3] == "x" else number / 100
    return Budget(found.get("params"), found.get("macs"), found.get("size"), latency=found.get("latency"))


def plan_budget(
    matrices: Matrices,
    budget: str | None,
    *,
    max_error: float | None = None,
    seed: int = 0,
    scaled: Collection[str] = (),
    apart: Collection[str] = (),
    searches: Searches | None = None,
    progress: Progress | None = None,
) -> BudgetPlan:
    """Structures for every gate of every matrix that together keep the most (weighted) energy within a budget.

    Every gate is tried at several sizes; then the budget goes, step by step, to the gate that gains the most energy per
    cost. Parameters and multiply-adds are separate costs (eight balanced terms at H = 256 take as many multiply-adds
    as the dense gate), and a budget may bind both. Energy is counted in the units of the matrices, so that a gate with
    large weights counts for more; weighted where every matrix has a covariance. A budget alone is planned twice, gate
    by gate and with the gates of each matrix stacked, and the plan that keeps more is taken.

    Args:
        matrices: name -> (weight (gates * rows, cols), number of gates, covariance (cols, cols) or None).
        budget: see `parse_budget`; of all matrices together. None plans by `max_error` alone.
        max_error: bound on the (weighted) relative error ||W - K|| / ||W|| of every gate. Without a budget each gate
            gets the fewest parameters that were found to keep it.
        seed: of the fits of three factors and more.
        scaled: names of the matrices whose products have a scale of their own, which counts as a parameter.
        apart: names of the matrices whose gates are not stacked.
        searches: a dict that the caller keeps for further plans of the same matrices with the same seed: filled at the
            first one, it spares the others the fits that they have in common. The plans are the same with and without.
        progress: told of the gates and stacks searched.

    Returns:
        the plan; the same for the same input.

    Raises:
        PlanError: no matrices, neither budget nor error bound, or a budget below the smallest structures.
        TargetMissedError: with the budget, some gate exceeds `max_error`.
        UsageError, UnsupportedError: a matrix that cannot be decomposed.
    """
    if not matrices:
        raise PlanError("there is no matrix to plan for")
    if budget is None and max_error is None:
        raise PlanError("a plan by budget needs a budget or an error bound", hint=f"Write for example {BUDGET_GRAMMAR}")
    if max_error is not None and not 0 <= max_error < 1:
        raise PlanError(f"an error bound lies between 0 and 1, got {max_error}")
    searches = {} if searches is None else searches
    gates = gates_of(matrices, seed, scaled, searches)
    if budget is None:
        assert max_error is not None
        chosen = []
        for done, gate in enumerate(gates):
            _tell(progress, done, len(gates))
            chosen.append(_within_error(gate, max_error))
            gate.search.free()
        return _collect(matrices, gates, chosen)
    limits = parse_budget(budget)
    if limits.of_network:
        raise PlanError("a budget of bytes or of time is of a whole network, not of its matrices", f"budget {budget}")
    # A bound on the error is one for every gate: a stack could keep it and one of its gates not.
    several = any(count > 1 and name not in apart for name, (_, count, _) in matrices.items())
    stacks = gates_of(matrices, seed, scaled, searches, True, apart) if several and max_error is None else []
    total = len(gates) + len(stacks)
    _tell(progress, 0, total)
    chosen = _allocated(gates, limits, budget, lambda done: _tell(progress, done, total))
    if max_error is not None:
        _check_error(gates, chosen, max_error, budget)
    if stacks and stacks_may_win(stacks, gates, limits):
        try:
            other = _allocated(stacks, limits, budget, lambda done: _tell(progress, len(gates) + done, total))
        except PlanError:  # the smallest stack is too large
            other = None
        if other is not None and _kept(stacks, other) > _kept(gates, chosen):
            gates, chosen = stacks, other
    _tell(progress, total, total)
    return _collect(matrices, gates, chosen)


def make_budget_plan(
    tensors: Mapping[str, AnyTensor],
    layers: Sequence[RecurrentLayer],
    budget: str | None,
    *,
    input_budget: str | None = None,
    max_error: float | None = None,
    input_factors: str | None = None,
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
        budget: of all recurrent matrices together, "10x", "params=25%", "macs=10%" (`parse_budget`).
        input_budget: the same for the input matrices W_ih; None leaves them dense.
        max_error: bound on the relative error of every gate; with no budget, the smallest structures that keep it.
        input_factors: spec of the input matrices, where they have no budget.
        only, skip, overrides: patterns as in `make_plan`; overrides are set on top of what the budget gave.
        moments: full weight name -> moments of what it is applied to: energy then counts at the output.
        searches: as in `plan_budget`.

    Raises:
        PlanError, TargetMissedError: the budget cannot be met; the text says what can.
    """
    inputs = None if input_budget is None else "auto"
    everything = make_plan(layers, "auto", inputs, only, skip)
    first_of = ties(as_lazy(tensors))
    names = {part: matrices_of(everything, tensors, part, moments, first_of) for part in ("weight_hh", "weight_ih")}
    scaled = {layer.full_name(weight) for layer, weight, structures in everything.matrices() if structures[0].scaled}
    apart = divided(layers, overrides)
    apart |= {first for name, first in first_of.items() if name in apart}
    chosen: dict[str, Structures] = {}
    for part, limit in (("weight_hh", budget), ("weight_ih", input_budget)):
        if names[part]:
            found = plan_budget(
                names[part],
                limit,
                max_error=max_error,
                seed=seed,
                scaled=scaled,
                apart=apart,
                searches=searches,
                progress=progress,
            )
            chosen |= found.structures
    chosen |= {name: chosen[first] for name, first in first_of.items() if first in chosen}
    return make_plan(layers, "auto", inputs or input_factors, only, skip, overrides, chosen)


@dataclass(frozen=True)
class Slack:
    """What one limit of a budget allows, and how much of it a plan takes.

    Attributes:
        of: "parameters", "multiply-adds" or "bytes".
    """

    of: str
    allowed: int
    used: int

    def __str__(self) -> str:
        left = self.allowed - self.used
        rest = f"{left:,} are left" if left >= 0 else f"it takes {-left:,} more"
        return f"the budget allows {self.allowed:,} {self.of}, {rest}"


def slack_of(plan: Plan, budget: str | None, part: str = "weight_hh") -> list[Slack]:
    """Of the limits of a budget of matrices, over those that are factored; none for one of bytes or time."""
    limits = Budget() if budget is None else parse_budget(budget)
    structures = [s for _, weight, found in plan.matrices() if weight.startswith(part) for s in found]
    dense = sum(s.dense_parameters for s in structures)
    found = []
    if limits.parameters is not None:
        found.append(Slack("parameters", int(limits.parameters * dense), sum(s.parameters for s in structures)))
    if limits.multiply_adds is not None:
        used = sum(s.multiply_adds for s in structures)
        found.append(Slack("multiply-adds", int(limits.multiply_adds * dense), used))
    return found


def matrices_of(
    plan: Plan,
    tensors: Mapping[str, AnyTensor],
    part: str,
    moments: Mapping[str, Moments] | None,
    first_of: Mapping[str, str],
) -> Matrices:
    """Of several names of one matrix the first."""
    found: dict[str, tuple[Tensor, int, Tensor | None]] = {}
    for layer, weight, structures in plan.matrices():
        if not weight.startswith(part):
            continue
        name = layer.full_name(weight)
        if first_of.get(name) in found:
            continue
        tensor = tensors[name]
        known = (moments or {}).get(name)
        covariance = None if known is None else known.weight(layer.bias)
        found[name] = (tensor.load() if isinstance(tensor, LazyTensor) else tensor, len(structures), covariance)
    return found


@dataclass
class Gate:
    """One gate, or all gates of a matrix stacked."""

    name: str
    number: int
    search: StructureSearch
    scale: float  # what a share of this gate's energy is worth beside the others'

    @property
    def dense(self) -> int:
        return self.search.rows * self.search.cols


def gates_of(
    matrices: Matrices,
    seed: int,
    scaled: Collection[str],
    searches: Searches,
    stacked: bool = False,
    apart: Collection[str] = (),
) -> list[Gate]:
    """Every gate of every matrix, or every matrix with its gates stacked, but for those of `apart`."""
    weighted = [c is not None for _, _, c in matrices.values()]
    mixed = any(weighted) and not all(weighted)  # energies in different units: every gate counts alike
    found = []
    for name, (weight, count, covariance) in matrices.items():
        if count < 1 or weight.ndim != 2 or weight.shape[0] % count:
            raise PlanError(f"a weight of shape {tuple(weight.shape)} does not hold {count} gates", name)
        together = count if stacked and name not in apart else 1
        for number, part in enumerate(weight.reshape(count // together, -1, weight.shape[1])):
            key = (name, -1 if together > 1 else number)
            search = searches.get(key)
            if search is None:
                check(part, Structure(*part.shape))
                first = searches.get((name, 0))  # one norm serves all of a matrix
                metric = metric_of(covariance, weight.shape[1]) if first is None else first.metric
                search = searches[key] = StructureSearch(part, metric, seed, together, name in scaled)
            found.append(Gate(*key, search, float(together) if mixed else search.total))
    return found


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total, "choosing factors")


def dense_of(gate: Gate) -> ScoredStructure:
    rows, cols = gate.search.rows, gate.search.cols
    return ScoredStructure(Structure(rows, cols, (Term(((rows, cols),)),), gates=gate.search.gates), 1.0)


def at_level(gate: Gate, limits: Budget, level: float = 1.0) -> tuple[int, int | None]:
    """Parameters and multiply-adds of one gate at so many times an even share of the budget."""
    share = limits.parameters or limits.multiply_adds or 1.0
    parameters = int(min(1.0, share * level) * gate.dense)
    if limits.multiply_adds is None:
        return parameters, None
    adds = int(min(1.0, limits.multiply_adds * level) * gate.dense)
    return parameters if limits.parameters is not None else gate.dense, adds


def stacks_may_win(stacks: Sequence[Gate], gates: Sequence[Gate], limits: Budget) -> bool:
    """Whether stacks keep as much as their gates where each gets an even share, as low rank alone, which is soon told,
    and as the best of all structures: gates share out a budget more finely, and stacks that begin with less do not make
    up for it."""

    def low_rank(gate: Gate) -> float:
        return gate.search.low_rank_energy(*at_level(gate, limits))

    def best(gate: Gate) -> float:
        energies = [c.energy for c in gate.search.candidates(*at_level(gate, limits))]
        gate.search.free()
        return max(energies, default=0.0)

    return all(
        sum(s.scale * kept(s) for s in stacks) >= sum(g.scale * kept(g) for g in gates) for kept in (low_rank, best)
    )


def pool_of(gate: Gate, limits: Budget) -> list[ScoredStructure]:
    """Candidates of many sizes around an even share of the budget, from the smallest there is to the dense matrix."""
    whole = dense_of(gate)
    pool = {whole.structure: whole}
    gate.search.singles(*at_level(gate, limits, max(LEVELS)))  # the most singular values first: they serve all others
    even = gate.search.candidates(*at_level(gate, limits))
    mixtures = [c.mixture for c in even if c.mixture is not None][:MIXTURES_LIMIT]
    for level in LEVELS:
        sized = even if level == 1.0 else gate.search.candidates(*at_level(gate, limits, level), mixtures)
        pool |= {candidate.structure: candidate for candidate in sized}
    most = at_level(gate, limits, max(LEVELS))[0]
    singles = gate.search.singles(*at_level(gate, limits))[:MIXTURES_LIMIT] if gate.dense >= FINER_FROM else []
    finer = [candidate for single in singles for candidate in gate.search.ranks(single, most)]
    for candidate in [*finer, *smallest_of(gate)]:
        pool.setdefault(candidate.structure, candidate)
    return list(pool.values())


def smallest_of(gate: Gate) -> list[ScoredStructure]:
    """One product each of low rank and of the balanced pair, and the product of the most factors there is."""
    search = gate.search
    found = search.singles(search.rows + search.cols)[:1]
    found += search.many_factors(min(c.parameters for c in found) - 1) if found else search.many_factors(gate.dense)
    return found


def _allocated(gates: list[Gate], limits: Budget, budget: str, tell: Callable[[int], None]) -> list[ScoredStructure]:
    pools = []
    for i, gate in enumerate(gates):
        pools.append(pool_of(gate, limits))
        gate.search.free()
        tell(i + 1)
    return _allocate(gates, pools, limits, budget)


def _kept(gates: list[Gate], chosen: list[ScoredStructure]) -> float:
    """The share of all energy."""
    return _worth(gates, chosen) / max(sum(gate.scale for gate in gates), 1e-300)


def _allocate(
    gates: list[Gate], pools: list[list[ScoredStructure]], limits: Budget, budget: str
) -> list[ScoredStructure]:
    dense = sum(g.dense for g in gates)
    most = tuple(math.inf if s is None else s * dense for s in (limits.parameters, limits.multiply_adds))
    table = Candidates(gates, pools, most)
    best: _Choice | None = None
    for weight in PRICES if math.inf not in most else (0.0 if most[1] == math.inf else 1.0,):
        chosen = table.greedy(weight)
        if chosen is not None and (best is None or table.worth(chosen) > table.worth(best)):
            best = chosen
    if best is None:
        smallest = sum(min(c.parameters for c in pool) for pool in pools)
        adds = sum(min(c.multiply_adds for c in pool) for pool in pools)
        raise PlanError(
            f"the smallest structures found take {smallest} parameters and {adds} multiply-adds of {dense}",
            f"budget {budget}",
            f"Allow at least params={_percent(smallest, dense)} or macs={_percent(adds, dense)}",
        )
    return [table.candidates[i] for i in table.exchanged(best)]


def _percent(part: int, whole: int) -> str:
    """Never less than the share."""
    return f"{math.ceil(10_000 * part / whole) / 100:g}%"


_Choice = np.ndarray[tuple[int], np.dtype[np.int64]]  # the index of one candidate per gate


def numbers_of(_: Gate, candidate: ScoredStructure) -> tuple[int, ...]:
    """What a candidate costs of a budget of numbers: parameters, multiply-adds."""
    return candidate.parameters, candidate.multiply_adds


class Candidates:
    """All candidates of all gates, and choices of one per gate within `most`.

    Args:
        most: of two costs, (parameters, multiply-adds) or what `cost` gives; infinite where unlimited.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        pools: Sequence[Sequence[ScoredStructure]],
        most: tuple[float, ...],
        cost: Callable[[Gate, ScoredStructure], tuple[int, ...]] = numbers_of,
    ) -> None:
        self.candidates = [c for pool in pools for c in sorted(pool, key=lambda c: (-c.energy, str(c.structure)))]
        self.gate = np.repeat(np.arange(len(gates)), [len(pool) for pool in pools])
        scale = np.array([gate.scale for gate in gates])[self.gate]
        self.energy = scale * np.array([c.energy for c in self.candidates])
        owners = [gate for gate, pool in zip(gates, pools, strict=True) for _ in pool]
        self.cost = np.array([cost(*o) for o in zip(owners, self.candidates, strict=True)], dtype=np.float64)
        self.most, self.least_gain = np.array(most), 1e-6 * scale

    def worth(self, chosen: _Choice) -> float:
        """The energy kept, in the units of the gates' scales."""
        return float(self.energy[chosen].sum())

    def _spare(self, chosen: _Choice) -> Any:
        return self.most - self.cost[chosen].sum(0) + 1e-9

    def greedy(self, weight: float) -> _Choice | None:
        """From the cheapest candidates upwards: again and again the exchange with the most energy per price, while it
        fits. `weight` prices multiply-adds against parameters."""
        price = self.cost / self.most @ np.array([1 - weight, weight])
        firsts = (np.flatnonzero(self.gate == g) for g in range(self.gate[-1] + 1))
        chosen = np.array([own[np.argmin(price[own])] for own in firsts])
        if (self._spare(chosen) < 0).any():
            return None
        while True:
            now = chosen[self.gate]
            gain = self.energy - self.energy[now]
            fits = (self.cost - self.cost[now] <= self._spare(chosen)).all(1)
            rate = np.where(fits & (gain > self.least_gain), gain / np.maximum(price - price[now], 1e-12), 0.0)
            best = int(np.argmax(rate))
            if rate[best] <= 0:
                return chosen
            chosen[self.gate[best]] = best

    def exchanged(self, chosen: _Choice) -> _Choice:
        """Again and again the two exchanges that together gain the most: one gate may give what another needs."""
        while len(self.candidates) <= PAIRS_LIMIT:
            now = chosen[self.gate]
            gain, cost = self.energy - self.energy[now], self.cost - self.cost[now]
            both = gain[:, None] + gain
            both[self.gate[:, None] == self.gate] = 0.0
            for spare, own in zip(self._spare(chosen), cost.T, strict=True):
                both[own[:, None] + own > spare] = 0.0
            first, second = np.unravel_index(np.argmax(both), both.shape)
            if both[first, second] <= 1e-9 * self.worth(chosen):
                break
            chosen[self.gate[[first, second]]] = first, second
        return chosen


def _worth(gates: list[Gate], chosen: list[ScoredStructure]) -> float:
    return sum(g.scale * c.energy for g, c in zip(gates, chosen, strict=True))


def _error(candidate: ScoredStructure) -> float:
    return math.sqrt(max(0.0, 1 - candidate.energy))


def _within_error(gate: Gate, max_error: float) -> ScoredStructure:
    for level in ERROR_LEVELS:
        good = [c for c in gate.search.candidates(int(level * gate.dense)) if _error(c) <= max_error]
        for candidate in sorted(good, key=lambda c: (c.parameters, c.multiply_adds, str(c.structure))):
            found = replace(candidate, energy=gate.search.fitted(candidate.structure)[1])
            if _error(found) <= max_error:  # the search is in single precision
                return found
    return dense_of(gate)


def _check_error(gates: list[Gate], chosen: list[ScoredStructure], max_error: float, budget: str) -> None:
    worst = max(range(len(gates)), key=lambda i: _error(chosen[i]))
    if _error(chosen[worst]) > max_error:
        raise TargetMissedError(
            f"gate {gates[worst].number} keeps a relative error of {_error(chosen[worst]):.3f}, above {max_error}",
            gates[worst].name,
            f"Allow more than {budget}, or a larger error",
        )


def _collect(matrices: Matrices, gates: list[Gate], chosen: list[ScoredStructure]) -> BudgetPlan:
    structures: dict[str, Structures] = {name: () for name in matrices}
    energy: dict[str, tuple[float, ...]] = {name: () for name in matrices}
    for gate, candidate in zip(gates, chosen, strict=True):
        structures[gate.name] += (candidate.structure,)
        energy[gate.name] += (candidate.energy,)
    return BudgetPlan(structures, energy)
