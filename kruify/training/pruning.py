"""Gradual pruning of sparse residuals: W = K + S, where S begins as (nearly) all of W - K and shrinks while training.

Doped Kronecker products (Thakker et al., MLSys 2021) anneal S from dense to sparse; the schedule is the cubic one of
gradual magnitude pruning (Zhu & Gupta 2017). A network that begins as the dense one gives K time to take over what S
has to give up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kruify.layers.matrix import KroneckerMatrix, SparseResidual

EVENTS = 100  # prunings from start to end
UNTIL = 0.6  # progress of the phase at which the final size is reached


@dataclass(frozen=True)
class _Residual:
    name: str
    matrix: KroneckerMatrix
    blocks: SparseResidual
    final: list[int]  # blocks per structure (a gate, or all gates stacked) in the end

    @property
    def rows(self) -> int:
        """Of one structure."""
        return self.matrix.structures[0].rows

    def structure_of_block(self) -> Tensor:  # (blocks,) int64
        return (self.blocks.index[:, 0] // self.rows).long()

    def counts(self) -> list[int]:
        """Blocks per structure now."""
        counts: list[int] = torch.bincount(self.structure_of_block(), minlength=len(self.final)).tolist()
        return counts

    def start(self, share: float) -> list[int]:
        """Blocks per structure at the beginning, `share` of all that there are."""
        possible = self.rows // self.blocks.values.shape[1] * self.matrix.cols
        return [max(n, round(share * possible)) if n else 0 for n in self.final]


class GradualPruning:
    """Grows the sparse residuals of `model` at the start of a run and prunes them to the size of their structures.

    Args:
        dense: the dense network's state dict; matrices that it does not hold are left alone.
        start: share of a structure's entries that its sparse residual begins with, 1 for all.
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor], start: float) -> None:
        self.dense, self.start = dense, start
        self.residuals = [
            _Residual(name, module, module.overlay, [s.sparse_blocks for s in module.structures])
            for name, module in model.named_modules()
            if isinstance(module, KroneckerMatrix) and module.overlay is not None and name in dense
        ]

    @property
    def done(self) -> bool:
        """Whether every sparse residual has its final size."""
        return all(item.counts() == item.final for item in self.residuals)

    @torch.no_grad()
    def grow(self) -> None:
        """Each sparse residual becomes the largest blocks of what the rest of its matrix leaves of the dense weight."""
        for item in self.residuals:
            blocks, matrix = item.blocks, item.matrix
            height = blocks.values.shape[1]
            blocks.values.zero_()
            residual = self.dense[item.name].to(matrix.device, matrix.dtype) - matrix.to_dense()
            candidates = residual.reshape(-1, height, matrix.cols).transpose(1, 2).reshape(-1, height)
            number = torch.arange(len(candidates), device=candidates.device)
            index = torch.stack([number // matrix.cols * height, number % matrix.cols], dim=1).to(torch.int32)
            keep = strongest(candidates, index[:, 0] // item.rows, item.start(self.start))
            blocks.values = nn.Parameter(candidates[keep].clone())
            blocks.index = index[keep].contiguous()

    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Give the sparse residuals the sizes that they have in a state dict, so that it can be loaded."""
        for item in self.residuals:
            count = len(state[f"{item.name}.overlay.values" if item.name else "overlay.values"])
            item.blocks.values = nn.Parameter(item.blocks.values.detach().new_zeros(count, item.blocks.values.shape[1]))
            item.blocks.index = item.blocks.index.new_zeros(count, 2)

    @torch.no_grad()
    def prune(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """Drop the weakest blocks beyond what `progress` in [0, 1] allows, from the optimiser too."""
        left = (1 - int(min(1.0, progress / UNTIL) * EVENTS) / EVENTS) ** 3  # share of what is to be pruned
        for item in self.residuals:
            start = item.start(self.start)
            wanted = [n + round(left * (first - n)) for first, n in zip(start, item.final, strict=True)]
            if all(now <= then for now, then in zip(item.counts(), wanted, strict=True)):
                continue
            old = item.blocks.values
            keep = strongest(old, item.structure_of_block(), wanted)
            item.blocks.values = nn.Parameter(old.detach()[keep].clone())
            item.blocks.index = item.blocks.index[keep].contiguous()
            _replace(optimizer, old, item.blocks.values, keep)


def strongest(
    blocks: Tensor,  # (n, height)
    structure: Tensor,  # (n,), the structure that each belongs to
    wanted: list[int],  # blocks to keep per structure
) -> Tensor:  # indices, ascending
    """The `wanted[s]` blocks of greatest norm of every structure s; of equal ones the first."""
    norms = blocks.square().sum(1)
    kept = []
    for s, count in enumerate(wanted):
        mine = (structure == s).nonzero().squeeze(1)
        order = norms[mine].sort(descending=True, stable=True).indices[:count]
        kept.append(mine[order])
    return torch.cat(kept).sort().values


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor) -> None:
    """Puts `new`, the rows `keep` of `old`, in its place, with the rows of its moments."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = {name: value[keep].clone() if value.ndim else value for name, value in state.items()}
