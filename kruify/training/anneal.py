"""Overlays that begin dense and are pruned while training: W = K + S, S from (nearly) all of W - K down to its final
blocks.

Doped Kronecker products (Thakker et al., MLSys 2021) anneal S from dense to sparse; the schedule is the cubic one of
gradual magnitude pruning (Zhu & Gupta 2017). A network that begins as the dense one gives K time to take over what S
has to give up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kruify.layers.matrix import KroneckerMatrix, SparseResidual
from kruify.training.ema import Average

EVENTS = 100  # prunings from start to end


@dataclass(frozen=True)
class _Item:
    name: str
    matrix: KroneckerMatrix
    overlay: SparseResidual
    final: tuple[int, ...]  # blocks a gate in the end

    @property
    def parameter(self) -> str:
        return f"{self.name}.overlay.values" if self.name else "overlay.values"

    @property
    def possible(self) -> int:
        """Blocks of one structure, a gate or all stacked, if it were dense."""
        return self.matrix.structures[0].rows // self.overlay.values.shape[1] * self.matrix.cols

    def gate(self) -> Tensor:  # (blocks,) int64
        return (self.overlay.index[:, 0] // self.matrix.structures[0].rows).long()

    def counts(self) -> list[int]:
        counts: list[int] = torch.bincount(self.gate(), minlength=len(self.final)).tolist()
        return counts


class OverlayAnnealing:
    """Grows the overlays of `model` at the start of a run and prunes them to the size that their structures say.

    Args:
        dense: the dense network's state dict; matrices that it does not hold are left alone.
        start: share of a gate's entries that its overlay begins with, 1 for all.
        until: progress in [0, 1] at which the final size is reached.
        pooled: all gates of all matrices compete for the same blocks, instead of each keeping the number that its
            structure says; the structures say in the end what became of it. The total is the same.
    """

    def __init__(
        self, model: nn.Module, dense: Mapping[str, Tensor], start: float, until: float, pooled: bool = False
    ) -> None:
        self.start, self.until, self.dense, self.pooled = start, until, dense, pooled
        self.items = [
            _Item(name, module, module.overlay, tuple(s.sparse_blocks for s in module.structures))
            for name, module in model.named_modules()
            if isinstance(module, KroneckerMatrix) and module.overlay is not None and name in dense
        ]

    @property
    def done(self) -> bool:
        """Whether every overlay has its final size."""
        if self.pooled:
            return sum(sum(item.counts()) for item in self.items) == sum(sum(item.final) for item in self.items)
        return all(item.counts() == list(item.final) for item in self.items)

    @torch.no_grad()
    def grow(self) -> None:
        """Each overlay becomes the largest blocks of what the rest of its matrix leaves of the dense weight."""
        for item in self.items:
            overlay, matrix = item.overlay, item.matrix
            block = overlay.values.shape[1]
            overlay.values.zero_()
            residual = self.dense[item.name].to(matrix.device, matrix.dtype) - matrix.to_dense()
            blocks = residual.reshape(-1, block, matrix.cols).transpose(1, 2).reshape(-1, block)
            wanted = [max(n, round(self.start * item.possible)) if n else 0 for n in item.final]
            index = torch.arange(len(blocks), device=blocks.device)
            where = torch.stack([index // matrix.cols * block, index % matrix.cols], dim=1).to(torch.int32)
            keep = strongest(blocks, where[:, 0] // matrix.structures[0].rows, wanted)
            overlay.values = nn.Parameter(blocks[keep].clone())
            overlay.index = where[keep].contiguous()

    def fit_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Give the overlays the sizes that they have in a saved state dict, so that it can be loaded."""
        for item in self.items:
            saved, overlay = state[item.parameter], item.overlay
            overlay.values = nn.Parameter(overlay.values.detach().new_zeros(saved.shape))
            overlay.index = overlay.index.new_zeros(saved.shape[0], 2)

    def wanted(self, item: _Item, progress: float) -> list[int]:
        """Blocks a gate at `progress`; it falls in EVENTS steps."""
        left = still_to_go(progress, self.until)
        return [n + round(left * max(0, round(self.start * item.possible) - n)) if n else 0 for n in item.final]

    @torch.no_grad()
    def prune(self, progress: float, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
        """Drop the weakest blocks beyond what `progress` allows, from the optimiser too."""
        have = [item.counts() for item in self.items]
        wanted = [self.wanted(item, progress) for item in self.items]
        if self.pooled:
            if sum(map(sum, have)) <= sum(map(sum, wanted)):
                return
            wanted = self._pool(sum(map(sum, wanted)))
        for item, now, then in zip(self.items, have, wanted, strict=True):
            if all(a <= b for a, b in zip(now, then, strict=True)):
                continue
            overlay = item.overlay
            keep = strongest(overlay.values, item.gate(), then)
            old = overlay.values
            overlay.values = nn.Parameter(old.detach()[keep].clone())
            overlay.index = overlay.index[keep].contiguous()
            _replace(optimizer, old, overlay.values, keep)
            if average is not None:
                average.shadow[item.parameter] = average.shadow[item.parameter][keep].clone()
        self.settle()

    def _pool(self, total: int) -> list[list[int]]:
        """How many of the `total` strongest blocks of all overlays each gate holds, at least one."""
        # Norms a number, so that blocks of different heights compare.
        norms = [item.overlay.values.square().mean(1) for item in self.items]
        order = torch.cat(norms).sort(descending=True, stable=True).indices
        # The first of every gate is safe: a structure that is an overlay alone must not end up empty.
        offset, gates, first = 0, [], []
        for item, norm in zip(self.items, norms, strict=True):
            gate = item.gate()
            for g in range(len(item.final)):
                mine = (gate == g).nonzero().squeeze(1)
                if not len(mine):
                    continue
                first.append(int(mine[norm[mine].argmax()]) + offset)
            gates.append(gate)
            offset += len(norm)
        safe = torch.zeros(offset, dtype=torch.bool, device=order.device)
        safe[first] = True
        kept = torch.zeros_like(safe)
        kept[torch.cat([order[safe[order]], order[~safe[order]]])[:total]] = True
        counts, offset = [], 0
        for item, gate in zip(self.items, gates, strict=True):
            mine = kept[offset : offset + len(gate)]
            counts.append(torch.bincount(gate[mine], minlength=len(item.final)).tolist())
            offset += len(gate)
        return counts

    def settle(self) -> None:
        """Let the structures say how many blocks each gate has, once pooled overlays have their final size."""
        if not (self.pooled and self.done):
            return
        for item in self.items:
            item.matrix.structures = tuple(
                replace(s, sparse_blocks=n) for s, n in zip(item.matrix.structures, item.counts(), strict=True)
            )


def still_to_go(progress: float, until: float) -> float:
    """Share of what has to be pruned by `until` that is still there at `progress` (Zhu & Gupta 2017)."""
    share = min(1.0, progress / until) if until > 0 else 1.0
    return (1 - int(share * EVENTS) / EVENTS) ** 3


def strongest(
    blocks: Tensor,  # (n, block)
    gate: Tensor,  # (n,)
    wanted: list[int],  # blocks to keep, a gate
) -> Tensor:  # indices, ascending
    """The `wanted[g]` blocks of greatest norm of every gate g; of equal ones the first."""
    norms = blocks.square().sum(1)
    kept = []
    for g, count in enumerate(wanted):
        mine = (gate == g).nonzero().squeeze(1)
        order = norms[mine].sort(descending=True, stable=True).indices[:count]
        kept.append(mine[order])
    return torch.cat(kept).sort().values


def exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict[str, Any] | None:
    """Puts `new` where `old` was; returns the state of `old`, None where it has none, for the caller to carry over."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state: dict[str, Any] | None = optimizer.state.pop(old, None)
    return state


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor) -> None:
    state = exchange(optimizer, old, new)
    if state is not None:
        rows = len(old)
        optimizer.state[new] = {
            key: value[keep].clone() if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in state.items()
        }
