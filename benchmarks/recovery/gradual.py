"""Gradual conversion: the network begins with four times the terms it may keep, and loses the weakest of them while it
is trained; before every loss the sum is decomposed anew, so that what goes is what the sum can best do without.

It lives here and not in the package until it wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kruify.finetune import Recipe
from kruify.finetune.anneal import OverlayAnnealing, exchange, still_to_go
from kruify.finetune.ema import Average
from kruify.finetune.finetune import phases_of
from kruify.finetune.processes import Processes
from kruify.finetune.result import FinetuneResult, OnProgress
from kruify.finetune.trainer import Trainer
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.plan import Plan
from kruify.task import Task

START, UNTIL = 4.0, 0.6


@dataclass
class _Item:
    matrix: KroneckerMatrix
    term: KroneckerTerm
    first: int  # terms in the beginning
    last: int  # and in the end


class FallingTerms:
    """What a `Trainer` asks of an annealing, for the number of products in sums of two-factor products.

    Args:
        model: converted with more terms than `plan` has.
        plan: what is left in the end, one sum a gate or one of all gates stacked.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        modules = dict(model.named_modules())
        self.items = []
        for layer, weight, structures in plan.matrices():
            matrix = modules[layer.full_name(weight)]
            assert isinstance(matrix, KroneckerMatrix)
            (term,), (last,) = matrix.term_list(), {t.rank for s in structures for t in s.terms}
            assert len(term.factors) == 2 and term.scale is None
            self.items.append(_Item(matrix, term, term.term.rank, last))

    @property
    def done(self) -> bool:
        return all(item.term.term.rank == item.last for item in self.items)

    def grow(self) -> None:
        """It begins large."""

    def settle(self) -> None:
        """The structures are true at every moment."""

    def fit_shapes(self, state: dict[str, Tensor]) -> None:
        for item in self.items:
            _set_rank(item, [f.new_zeros(f.shape[0], item.last, *f.shape[2:]) for f in item.term.factors])

    @torch.no_grad()
    def prune(self, progress: float, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
        """Zhu & Gupta's cubic schedule; the moments of Adam turn with the terms."""
        assert average is None
        left = still_to_go(progress, UNTIL)
        for item in self.items:
            rank = item.last + round(left * (item.first - item.last))
            if rank < item.term.term.rank:
                _reduce(item, rank, optimizer)


def _reduce(item: _Item, rank: int, optimizer: torch.optim.Optimizer) -> None:
    """The best `rank` terms of the sum: with M = A^T B over the terms, an SVD of the small matrix between A and B."""
    old = list(item.term.factors)
    a, b = (_rows(f.double(), item.term.stacked) for f in old)
    r_a, r_b = (torch.linalg.qr(x.mT, mode="r").R for x in (a, b))
    u, s, v = torch.linalg.svd(r_a @ r_b.mT)
    scale = s[:, None, :rank].sqrt()
    turn_a, turn_b = r_b.mT @ v.mT[..., :rank] / scale, r_a.mT @ u[..., :rank] / scale
    _set_rank(item, [_turned(old[0], turn_a), _turned(old[1], turn_b)])
    # The gradient of a factor is one of M times the other factor, so its moments turn as the other factor does.
    for before, after, turn in zip(old, item.term.factors, (turn_b, turn_a), strict=True):
        if state := exchange(optimizer, before, after):
            state["exp_avg"] = _turned(state["exp_avg"], turn)
            state["exp_avg_sq"] = _turned(state["exp_avg_sq"], turn.square())
            optimizer.state[after] = state


def _rows(factor: Tensor, together: bool) -> Tensor:  # (g, terms, P, Q) -> (g, terms, P * Q), or (1, terms, g * P * Q)
    return factor.transpose(0, 1).flatten(1)[None] if together else factor.flatten(2)


def _turned(factor: Tensor, turn: Tensor) -> Tensor:  # (g, terms, P, Q), (g or 1, terms, rank) -> (g, rank, P, Q)
    return torch.einsum("gtpq,gtr->grpq", factor.double(), turn.expand(len(factor), -1, -1)).to(factor.dtype)


def _set_rank(item: _Item, factors: list[Tensor]) -> None:
    term, rank = item.term, factors[0].shape[1]
    term.term = replace(term.term, rank=rank)
    for i, factor in enumerate(factors):
        term.factors[i] = nn.Parameter(factor)
    item.matrix.structures = tuple(replace(s, terms=(term.term,)) for s in item.matrix.structures)
    item.matrix.__dict__.pop("_kernel_form", None)  # layers/kernel.py works it out once for a matrix


def finetune_gradually(
    model: nn.Module,
    plan: Plan,
    task: Task,
    teacher: nn.Module | None,
    options: dict[str, Any],
    on_progress: OnProgress | None,
) -> FinetuneResult:
    """`kruify.finetune` with terms that fall to those of `plan`. It cannot be interrupted: a state has one size."""
    recipe = Recipe().changed(**options, evaluate_first=False)
    phases, processes = phases_of(model, task, teacher, recipe), Processes("cpu")
    falling = cast(OverlayAnnealing, FallingTerms(model, plan))
    return Trainer(model, task, phases, recipe, processes, annealing=falling, on_progress=on_progress).run()
