"""A plan from a budget of bytes that counts what an error costs in loss, not the energy of it alone.

Energy, E||(W - K) h||^2, weighs all matrices alike, the loss does not: an error of W_ih costs three times and more
what an error of W_hh of the same energy does on jsb and fashion-mnist-rows (benchmarks/recovery/errors.py). No gradient
of one step tells that: both enter the same sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kruify.checkpoint.tensors import ties
from kruify.conversion.budget import Searches
from kruify.conversion.calibration import BATCHES, Moments
from kruify.conversion.locate import BESIDE
from kruify.conversion.modules import convert_module
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.renaming import names_in
from kruify.conversion.result import GateResult
from kruify.conversion.size import FileSize, matrices_in, plan_size
from kruify.errors import TaskError
from kruify.factors import Structure
from kruify.progress import Progress
from kruify.tasks.base import Task, check_weight, evaluating, one_number, to_device

LEAST_LOST = 1e-3  # share of a matrix's energy, below which the loss tells nothing of it


def plan_by_loss(
    file: FileSize,
    budget: str,
    *,
    dense: nn.Module,
    task: Task,
    moments: Mapping[str, Moments] | None,
    searches: Searches | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Of two plans the one whose network, untrained, has the lower loss: that of `plan_size`, and another one whose
    matrices count by their sensitivity, the rise of the loss for the energy lost where a matrix alone has the structure
    that the first plan gives it.

    Args:
        dense: the network, which may be wrapped in another way than that of the file.
        file, budget, options: those of `plan_size`.

    Raises:
        PlanError: the budget cannot be met.
        TaskError: as `mean_loss`.
    """
    options |= {"moments": moments, "searches": {} if searches is None else searches, "progress": progress}
    planned = plan_size(file, budget, **options)
    probe = _probe(file, planned)
    matrices = matrices_in(file, probe, moments)
    if len(matrices) < 2 or moments is None or not moments.keys() >= matrices.keys():
        return planned
    done, total = itertools.count(1), len(matrices) + 2
    name_in = names_in(dense, file.tensors)
    known = {name_in(name): found for name, found in moments.items()}

    def loss(plan: Plan) -> tuple[float, Sequence[GateResult]]:
        network, conversion = convert_module(dense, plan.renamed(name_in), moments=known, seed=file.seed)
        found = mean_loss(network, task, file.seed)
        if progress is not None:
            progress(next(done), total, "weighing matrices by the loss")
        return found, conversion.matrices

    before = mean_loss(dense, task, file.seed)
    rises, losts = dict[str, float](), dict[str, float]()
    for name, (weight, _, covariance) in matrices.items():
        after, gates = loss(_alone(file, probe, name))
        assert covariance is not None
        lost, energy = _lost(weight, covariance, gates)
        if lost > LEAST_LOST * energy:
            rises[name], losts[name] = max(0.0, after - before), lost
    rise = sum(rises.values())
    if not 0 < rise < math.inf:
        return planned
    worth = {name: rises[name] / lost * sum(losts.values()) / rise for name, lost in losts.items()}
    other = plan_size(file, budget, worth=worth, **options)
    return other if other != planned and loss(other)[0] < loss(planned)[0] else planned


def mean_loss(model: nn.Module, task: Task, seed: int = 0) -> float:
    """Over the first batches of "train", in evaluation mode.

    Raises:
        TaskError: there is no batch, or a loss is not one number.
    """
    total = weights = 0.0
    with evaluating(model) as device:
        for batch in itertools.islice(task.batches("train", seed=seed), BATCHES):
            weight, batch = check_weight(task.weight(batch), task), to_device(batch, device)
            total += weight * float(one_number(task.loss(task.forward(model, batch), batch), task))
            weights += weight
    if not weights:
        raise TaskError('split "train" has no batches', where=type(task).__name__)
    return total / weights


def _probe(file: FileSize, plan: Plan) -> Plan:
    """The plan, with low rank of half of the numbers for layers beside the recurrent ones that it leaves dense: energy
    does not compare outputs with the inputs of gates, so that it may have left out what costs the loss the least."""
    known, low_rank = plan.structures(), dict[str, Sequence[Structure | str]]()
    for layer in file.layers:
        if layer.kind in BESIDE and layer.full_name("weight") not in known:
            rows, cols = layer.shape("weight")
            rank = rows * cols // (2 * (rows + cols))
            low_rank[layer.full_name("weight")] = [f"{rank}*({rows}x1,1x{cols})"]
    return make_plan(file.layers, "dense", "dense", chosen={**known, **low_rank})


def _alone(file: FileSize, plan: Plan, name: str) -> Plan:
    """The plan of one matrix, whatever names it has; the others stay dense."""
    second, structures = ties(file.tensors_in_float32), plan.structures()
    chosen = {own: found for own, found in structures.items() if second.get(own, own) == name}
    return make_plan(file.layers, "dense", "dense", chosen=chosen)


def _lost(weight: Tensor, covariance: Tensor, gates: Sequence[GateResult]) -> tuple[float, float]:
    """E||(W - K) h||^2 and E||W h||^2 of one matrix."""
    parts = weight.double().reshape(-1, *gates[0].shape)
    energy = ((parts @ covariance) * parts).sum((1, 2))
    kept = energy.new_tensor([gate.energy_weighted or 0.0 for gate in gates[: len(parts)]])
    return float(((1 - kept) * energy).sum()), float(energy.sum())
