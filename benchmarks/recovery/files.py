"""Structures whose file, stored as int8, has at most so many bytes: what the methods of the grid by bytes train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from kruify import convert
from kruify.conversion.beside import NARROW, layers_beside
from kruify.conversion.locate import RecurrentLayer, locate
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.sensitivity import mean_loss
from kruify.conversion.size import FileSize, largest_within
from kruify.errors import PlanError
from kruify.search.graph_ranks import stacked_low_rank
from kruify.tasks.base import Task

FilePlan = Callable[[nn.Module, Task, str], Plan]  # the dense network, its task, the budget


def low_rank_of_stack(dense: nn.Module, task: Task, budget: str) -> Plan:
    """Every matrix as torch holds it, gates above each other, by its truncated SVD."""

    def plan_of(layers: Sequence[RecurrentLayer]) -> Plan:
        file = FileSize(dense.state_dict(), layers)
        return _largest(file, budget, lambda share: stacked_low_rank(file.layers, share))

    return _better(dense, task, plan_of)


def low_rank_and_blocks(dense: nn.Module, task: Task, budget: str) -> Plan:
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


def largest_entries(dense: nn.Module, task: Task, budget: str) -> Plan:
    """The largest entries of every matrix, counted as `PrunedSize` does."""

    def plan_of(layers: Sequence[RecurrentLayer]) -> Plan:
        names = [
            layer.full_name(weight) for layer in layers for weight in layer.weights if layer.shape(weight)[1] >= NARROW
        ]

        def pruned(share: float) -> Plan:
            specs = {name: f"stacked:sparse:{100 * share:.6f}%:1" for name in names}
            return make_plan(layers, "dense", "dense", overrides=specs)

        return _largest(PrunedSize(dense.state_dict(), layers), budget, pruned)

    return _better(dense, task, plan_of)


def _better(dense: nn.Module, task: Task, plan_of: Callable[[Sequence[RecurrentLayer]], Plan]) -> Plan:
    """Of the recurrent layers alone, or linear layers and embeddings, too: what has the lower loss, untrained."""
    recurrent = locate(dense).layers
    plans = []
    for layers in (recurrent, [*recurrent, *layers_beside(dense, task)]):
        with suppress(PlanError):
            plans.append(plan_of(layers))
    if not plans:
        raise PlanError("no file of this kind is so small")
    return min(plans, key=lambda plan: mean_loss(convert(dense, plan=plan)[0], task))


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
