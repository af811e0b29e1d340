"""Structures whose file, stored as int8, has at most so many bytes: what the methods of the grid by bytes train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kruify.conversion.locate import locate
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.size import FileSize, largest_within
from kruify.errors import PlanError
from kruify.search.candidates import NARROW, stacked_low_rank

FilePlan = Callable[[nn.Module, str], Plan]  # the dense network, the budget


def low_rank_of_stack(dense: nn.Module, budget: str) -> Plan:
    """Every matrix as torch holds it, gates above each other, by its truncated SVD."""
    file = file_of(dense)
    return _largest(file, budget, lambda share: stacked_low_rank(file.layers, share))


def low_rank_and_blocks(dense: nn.Module, budget: str) -> Plan:
    """The same, and 4 % of the recurrent matrices in blocks of eight entries: the structure of `make demo`."""
    file = file_of(dense)

    def ranked(share: float) -> Plan | None:
        plan = stacked_low_rank(file.layers, share)
        if plan is None:
            return None
        specs = {
            layer.full_name(weight): f"{found[0]}" + ("+sparse:4%:8" if "weight_hh" in weight else "")
            for layer, weight, found in plan.matrices()
        }
        return make_plan(file.layers, "dense", "dense", overrides=specs)

    return _largest(file, budget, ranked)


def largest_entries(dense: nn.Module, budget: str) -> Plan:
    """The largest entries of every matrix, counted as `PrunedSize` does."""
    file = PrunedSize(dense.state_dict(), locate(dense).layers)
    names = [
        layer.full_name(weight) for layer in file.layers for weight in layer.weights if layer.shape(weight)[1] >= NARROW
    ]

    def pruned(share: float) -> Plan:
        specs = {name: f"stacked:sparse:{100 * share:.6f}%:1" for name in names}
        return make_plan(file.layers, "dense", "dense", overrides=specs)

    return _largest(file, budget, pruned)


def file_of(dense: nn.Module) -> FileSize:
    return FileSize(dense.state_dict(), locate(dense).layers)


@dataclass(frozen=True)
class PrunedSize(FileSize):
    """An entry is one byte and its place another, the distance from the entry before it (Han et al. 2016): kruify's
    own index takes two, and a rival is given the better one."""

    def of(self, plan: Plan) -> int:
        return super().of(plan) - single_entries(plan)


def single_entries(plan: Plan) -> int:
    """Entries of sparse residuals that stand alone, not in blocks."""
    return sum(s.sparse_blocks for _, _, found in plan.matrices() for s in found if s.block == 1)


def smaller_hidden(model_of: Callable[[int], nn.Module], limit: int) -> int:
    """The most hidden units of a dense network whose file in int8 has at most `limit` bytes."""
    low, high = 1, 2
    while file_of(model_of(high)).of(Plan()) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if file_of(model_of(middle)).of(Plan()) <= limit else (low, middle)
    return low


def _largest(file: FileSize, budget: str, make: Callable[[float], Plan | None]) -> Plan:
    found = largest_within(file.limit(budget), file.of, make)
    if found is None:
        raise PlanError("no file of this kind is so small", f"budget {budget}")
    return found
