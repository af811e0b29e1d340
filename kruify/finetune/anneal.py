"""Overlays that begin dense and are pruned while training: W = K + S, S from (nearly) all of W - K down to its final
blocks.

Doped Kronecker products (Thakker et al., MLSys 2021) anneal S from dense to sparse; the schedule is the cubic one of
gradual magnitude pruning (Zhu & Gupta 2017). A network that begins as the dense one gives K time to take over what S
has to give up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kruify.finetune.ema import Average
from kruify.layers.matrix import KroneckerMatrix, Overlay

EVENTS = 100  # prunings from start to end


@dataclass(frozen=True)
class _Item:
    name: str
    matrix: KroneckerMatrix
    overlay: Overlay
    final: tuple[int, ...]  # blocks a gate in the end

    @property
    def parameter(self) -> str:
        return f"{self.name}.overlay.values" if self.name else "overlay.values"

    @property
    def possible(self) -> int:
        """Blocks of one gate if it were dense."""
        return self.matrix.rows // self.overlay.values.shape[1] * self.matrix.cols

    def counts(self) -> list[int]:
        gate = self.overlay.index[:, 0] // self.matrix.rows
        return torch.bincount(gate.long(), minlength=self.matrix.gates).tolist()


class OverlayAnnealing:
    """Grows the overlays of `model` at the start of a run and prunes them to the size that their structures say.

    Args:
        dense: the dense network's state dict; matrices that it does not hold are left alone.
        start: share of a gate's entries that its overlay begins with, 1 for all.
        until: progress in [0, 1] at which the final size is reached.
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor], start: float, until: float) -> None:
        self.start, self.until, self.dense = start, until, dense
        self.items = [
            _Item(name, module, module.overlay, tuple(s.sparse_blocks for s in module.structures))
            for name, module in model.named_modules()
            if isinstance(module, KroneckerMatrix) and module.overlay is not None and name in dense
        ]

    @property
    def done(self) -> bool:
        """Whether every overlay has its final size."""
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
            keep = strongest(blocks, where[:, 0] // matrix.rows, wanted)
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
        share = min(1.0, progress / self.until) if self.until > 0 else 1.0
        left = (1 - int(share * EVENTS) / EVENTS) ** 3
        return [n + round(left * max(0, round(self.start * item.possible) - n)) if n else 0 for n in item.final]

    @torch.no_grad()
    def prune(self, progress: float, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
        """Drop the weakest blocks of every gate that has more than `progress` allows, from the optimiser too."""
        for item in self.items:
            wanted, overlay = self.wanted(item, progress), item.overlay
            if all(have <= want for have, want in zip(item.counts(), wanted, strict=True)):
                continue
            keep = strongest(overlay.values, overlay.index[:, 0] // item.matrix.rows, wanted)
            old = overlay.values
            overlay.values = nn.Parameter(old.detach()[keep].clone())
            overlay.index = overlay.index[keep].contiguous()
            _replace(optimizer, old, overlay.values, keep)
            if average is not None:
                average.shadow[item.parameter] = average.shadow[item.parameter][keep].clone()


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


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        rows = len(old)
        optimizer.state[new] = {
            key: value[keep].clone() if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in state.items()
        }
