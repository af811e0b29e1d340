"""A plan from a budget of bytes: the file of the whole network is at most so large, and its matrices keep the most.

W_hh and W_ih share the bytes: an exchange is worth the energy it keeps of what the matrices give (weighted with the
moments of a task, else of the matrices themselves), over all layers and gates. A matrix may stay dense in the dtype of
the file, and what cannot be factored is counted in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.stored import encode
from kruify.checkpoint.target import TORCH
from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy, safetensors_bytes
from kruify.conversion.budget import (
    Budget,
    Candidates,
    Gate,
    Matrices,
    Searches,
    dense_of,
    gates_of,
    matrices_of,
    parse_budget,
    pool_of,
    smallest_of,
)
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import BESIDE, AnyTensor, RecurrentLayer
from kruify.conversion.plan import Plan, Structures, make_plan
from kruify.conversion.storing import (
    as_file,
    in_float32,
    no_numbers,
    planned,
    planned_matrix,
    storage_for,
    weight_bytes,
    with_dense,
)
from kruify.decomposition.structure_search import ScoredStructure
from kruify.errors import FactorSpecError, PlanError, UsageError
from kruify.factors import Structure, Term
from kruify.graphs import GraphBytes
from kruify.progress import Progress

DTYPE = "int8"
"""How weights are stored under a budget of bytes if nothing else is said."""
LEAST_SHARE = 1e-3  # of the dense matrices, that candidates are looked for around
STEPS = 14  # of the bisection for a share
ROUNDS = 12  # of corrections of the bytes that the matrices may take,
NO_MORE = 1e-3  # or until so little of the budget is open
DENSE_FROM = 0.9  # of the bytes of a dense matrix, from which factors in its place save too little
ENTRY = 64  # bytes of the header that a tensor takes, about: gates of one structure share their tensors
_HASH = "0" * 64
P = TypeVar("P")
"""A plan, or several."""


@dataclass(frozen=True)
class FileSize:
    """Counts the bytes of the safetensors file that a plan gives: header, indices and scales included.

    Attributes:
        tensors: of the dense network.
        layers: its recurrent layers, and those beside them that may be factored.
        dtype, keep: how the file stores weights (`kruify.quantize`).
        seed, extra, source_sha256: what else the file says.
        before: bytes of the source's weights, if not those of `tensors`.
    """

    tensors: Mapping[str, AnyTensor]
    layers: Sequence[RecurrentLayer]
    dtype: str = DTYPE
    keep: Sequence[str] = ()
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    source_sha256: str = _HASH
    before: int = 0
    _costs: dict[tuple[Structure, str], int] = field(default_factory=dict, repr=False, compare=False)

    def of(self, plan: Plan) -> int:
        """Bytes of the file."""
        plan = with_dense(plan, [replace(layer, dtype="float32") for layer in self.layers])
        future = planned(self.tensors_in_float32, plan)
        storage = storage_for(future, plan, self.dtype, self.keep)
        file = as_file(future, plan, storage, source_sha256=self.source_sha256, seed=self.seed, extra=self.extra)
        return safetensors_bytes(*file)

    def limit(self, budget: str) -> int:
        """The bytes that "size=8x" of the source's weights, or "size=600kB", allows."""
        return allowed_bytes(budget, self.before or weight_bytes(as_lazy(self.tensors)))

    def cost(self, gate: Gate, candidate: ScoredStructure) -> tuple[int, int]:
        """Bytes of the tensors of one gate, or stacked gates; the second number is for `Candidates`, which has two."""
        key = (candidate.structure, self._storage.get(gate.name, "float32"))
        if key not in self._costs:
            self._costs[key] = _tensor_bytes(*key)
        return self._costs[key], 0

    @cached_property
    def tensors_in_float32(self) -> dict[str, LazyTensor]:
        return in_float32(self.tensors)

    @cached_property
    def _storage(self) -> dict[str, str]:
        return storage_for(self.tensors_in_float32, Plan(), self.dtype, self.keep)


@dataclass(frozen=True)
class GraphSize(FileSize):
    """Counts the bytes of the whole ONNX graph that a plan gives.

    Attributes:
        graph: the original.
    """

    graph: GraphBytes | None = None

    def of(self, plan: Plan) -> int:
        """Bytes of the graph's files."""
        assert self.graph is not None
        plan = with_dense(plan, [replace(layer, dtype="float32") for layer in self.layers])
        future = planned(self.tensors_in_float32, plan)
        return self.graph.of(future, plan.structures(), storage_for(future, plan, self.dtype, self.keep))


def _tensor_bytes(structure: Structure, dtype: str) -> int:
    size = (structure.rows, structure.cols)
    matrices = {"w": size}
    if _is_dense(structure):
        tensors, matrices = {"w": LazyTensor(size, torch.float32, no_numbers)}, {}
    else:
        tensors = planned_matrix("w", (structure,), torch.float32)
    return sum(tensor.nbytes + ENTRY for tensor in encode(tensors, {"w": dtype}, matrices).values())


def _is_dense(structure: Structure) -> bool:
    terms = [term.factors for term in structure.terms if term.rank == 1]
    return terms == [((structure.rows, structure.cols),)] and structure.parameters == structure.dense_parameters


def check_budget_target(budget: str, path: str | PathLike[str]) -> None:
    """Raises `UsageError` where a budget is of bytes and the file is not of the kind whose bytes are counted."""
    if parse_budget(budget).of_file and Path(path).suffix.lower() in TORCH:
        raise UsageError("a budget of bytes is of a safetensors file", path, "Name it OUT.safetensors")


def allowed_bytes(budget: str, before: int) -> int:
    """The bytes that "size=8x" of `before`, or "size=600kB", allows."""
    found = parse_budget(budget)
    if found.bytes is not None:
        return found.bytes
    assert found.size is not None
    return int(found.size * before)


def largest_within(limit: int, size: Callable[[P], int], make: Callable[[float], P | None]) -> P | None:
    """The plan `make(share)` of the largest share of the parameters whose size is within a limit; None where none is.

    Args:
        make: share -> plan, None where there is none so small.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        share = (low + high) / 2
        plan = make(share)
        if plan is not None and size(plan) > limit:
            high = share
        else:
            low, best = share, plan
    return best


def plan_size(
    file: FileSize,
    budget: str,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    moments: Mapping[str, Moments] | None = None,
    worth: Mapping[str, float] | None = None,
    searches: Searches | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Structures of W_hh and W_ih, and of layers beside, that keep the most (weighted) energy in a file of at most so
    many bytes.

    Every gate, and every matrix with its gates stacked, is tried at several sizes. The bytes go, step by step, to the
    gate that gains the most energy a byte, and each matrix takes the form, by gates or stacked, that keeps more. A
    matrix that stays dense is not in the plan.

    Args:
        budget: "size=8x" of the bytes of the source's weights, or "size=600kB" (`parse_budget`).
        only, skip, overrides: patterns as in `make_plan`; overrides are set on top of what the budget gave.
        moments: full weight name -> moments of what it is applied to: energy then counts at the output.
        worth: full weight name -> what energy of this matrix counts beside that of others, 1 if not said.
        searches: as in `plan_budget`.

    Raises:
        PlanError: the budget is below the smallest file that was found; the text says how small that is.
    """
    limit = file.limit(budget)

    def make(chosen: Mapping[str, Structures]) -> Plan:
        factored = {name: found for name, found in chosen.items() if not all(map(_is_dense, found))}
        return make_plan(file.layers, "dense", "dense", only, skip, overrides, factored)

    dense = make({})
    size = file.of(dense)
    if size <= limit:
        return dense
    forms = _forms(file, make_plan(file.layers, "auto", "auto", only, skip), moments, searches)
    for gate in [gate for form in forms for item in form.values() for gate in item.gates]:
        gate.scale *= (worth or {}).get(gate.name, 1.0)
    if not forms[0]:
        raise below_smallest(budget, limit, size)
    whole = sum(form.dense for form in forms[0].values())
    share = (limit - size + whole) / whole
    _offer(file, forms, Budget(min(1.0, max(share, LEAST_SHARE))), progress)
    second = ties(file.tensors_in_float32)

    def plan_of(form: Mapping[str, _Form], found: Sequence[ScoredStructure]) -> Plan:
        left, chosen = list(found), dict[str, Structures]()
        for name, item in form.items():
            chosen[name] = tuple(left.pop(0).structure for _ in item.gates)
        return make(chosen | {name: chosen[first] for name, first in second.items() if first in chosen})

    def tried(form: Mapping[str, _Form], found: Sequence[ScoredStructure]) -> tuple[int, float, Plan] | None:
        """Bytes left, energy, plan."""
        try:
            plan = plan_of(form, found)
        except FactorSpecError:  # an override of one gate does not go with stacked ones
            return None
        gates = [gate for item in form.values() for gate in item.gates]
        return limit - file.of(plan), sum(g.scale * c.energy for g, c in zip(gates, found, strict=True)), plan

    def fill(form: Mapping[str, _Form]) -> tuple[float, Plan] | None:
        """Energy and plan of what fits."""
        gates = [gate for item in form.values() for gate in item.gates]
        pools = [pool for item in form.values() for pool in item.pools]
        best = tried(form, _cheapest(form))
        if best is None or best[0] < 0:
            return None
        low, high = float(sum(item.least for item in form.values())), math.inf
        allowed = max(low, float(limit - size + whole))
        for _ in range(ROUNDS):  # header, and what the gates of a matrix have in common, depend on the plan
            table = Candidates(gates, pools, (max(allowed, 1.0), math.inf), file.cost)
            start = table.greedy(0.0)
            now = None if start is None else tried(form, [table.candidates[i] for i in table.exchanged(start)])
            if now is None:
                break
            slack, after, known = now[0], allowed + now[0], high < math.inf
            low, high = (allowed, high) if slack >= 0 else (low, allowed)
            if slack >= 0 and now[1] > best[1]:
                best = now
            if slack == 0 or high - low < NO_MORE * limit:
                break
            allowed = (low + high) / 2 if known or not low < after < high else after
        return best[1:]

    least = {name: min((form[name] for form in forms), key=lambda item: item.least) for name in forms[0]}
    known = [(found, form) for form in (*forms, least) if (found := fill(form)) is not None]
    if not known:
        smallest = [limit - t[0] for form in (*forms, least) if (t := tried(form, _cheapest(form))) is not None]
        raise below_smallest(budget, limit, min([size, *smallest]))
    best, taken = max(known, key=lambda item: item[0][0])
    for name in taken:
        for form in forms:
            other = {**taken, name: form[name]}
            found = fill(other) if form[name] is not taken[name] else None
            if found is not None and found[0] > best[0]:
                best, taken = found, other
    return best[1]


def below_smallest(budget: str, limit: int, smallest: int) -> PlanError:
    """What is said where not even the smallest file is within a budget."""
    return PlanError(
        f"the smallest file that was found takes {smallest:,} bytes, and {limit:,} are allowed",
        f"budget {budget}",
        f"Allow size={smallest}, or store more of it in fewer bits (--dtype, --keep)",
    )


@dataclass(eq=False)
class _Form:
    """A matrix by gates, or its gates stacked: candidates, and bytes of the dense matrix and of the least there is."""

    gates: list[Gate] = field(default_factory=list)
    pools: list[list[ScoredStructure]] = field(default_factory=list)
    cheapest: list[ScoredStructure] = field(default_factory=list)
    dense: int = 0
    least: int = 0


def matrices_in(file: FileSize, plan: Plan, moments: Mapping[str, Moments] | None) -> Matrices:
    """Those of the plan, as `budget.matrices_of` has them: W_hh, then W_ih, then those of layers beside."""
    tensors = file.tensors_in_float32
    second, found = ties(tensors), dict[str, tuple[Tensor, int, Tensor | None]]()
    for part, of in (("weight_hh", plan), ("weight_ih", plan), ("weight", Plan(beside=plan.beside))):
        found |= matrices_of(of, tensors, part, moments, second)
    return found


def _forms(
    file: FileSize, everything: Plan, moments: Mapping[str, Moments] | None, searches: Searches | None
) -> list[dict[str, _Form]]:
    """Both forms of every matrix, by its name, nothing offered yet."""
    matrices = matrices_in(file, everything, moments)
    scaled = {layer.full_name(weight) for layer, weight, found in everything.matrices() if found[0].scaled}
    searches = {} if searches is None else searches
    several = any(count > 1 for _, count, _ in matrices.values())
    forms = []
    for stacked in (False, True)[: 1 + several]:
        form = {name: _Form() for name in matrices}
        for gate in gates_of(matrices, file.seed, scaled, searches, stacked=stacked):
            form[gate.name].gates.append(gate)
            form[gate.name].dense += file.cost(gate, dense_of(gate))[0]
        forms.append(form)
    return forms


def _smallest(file: FileSize, gate: Gate) -> ScoredStructure:
    return min([*smallest_of(gate), dense_of(gate)], key=lambda c: file.cost(gate, c))


def _low_ranks(gate: Gate) -> list[ScoredStructure]:
    """The only structures of a layer beside the recurrent ones, from the largest to rank 1: fast on any device."""
    one = Structure(gate.search.rows, gate.search.cols, (Term(gate.search.low_rank()),))
    return gate.search.ranks(ScoredStructure(one, 0.0), gate.dense)


def _cheapest(form: Mapping[str, _Form]) -> list[ScoredStructure]:
    return [candidate for item in form.values() for candidate in item.cheapest]


def _offer(file: FileSize, forms: Sequence[Mapping[str, _Form]], share: Budget, progress: Progress | None) -> None:
    items = [(item, gate) for form in forms for item in form.values() for gate in item.gates]
    beside = {layer.full_name("weight") for layer in file.layers if layer.kind in BESIDE}
    for done, (item, gate) in enumerate(items):
        if progress is not None:
            progress(done, len(items), "choosing factors")
        dense = dense_of(gate)
        if gate.name in beside:
            pool = _low_ranks(gate)
            least = pool[-1]
        else:
            pool, least = pool_of(gate, share), _smallest(file, gate)
        bounds = file.cost(gate, least)[0], DENSE_FROM * file.cost(gate, dense)[0]
        kept = [c for c in pool if bounds[0] <= file.cost(gate, c)[0] < bounds[1]]
        item.pools.append([*kept, *dict.fromkeys([least, dense])])
        item.cheapest.append(least)
        item.least += bounds[0]
        gate.search.free()
