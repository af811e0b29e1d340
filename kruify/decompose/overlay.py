"""The sparse overlay: blocks of consecutive rows in one column, the heaviest of what the other parts leave."""

from __future__ import annotations

import torch
from torch import Tensor


def best_overlay(rest: Tensor, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """The `blocks` blocks of `block` rows x 1 column of (rows, cols) that hold the most energy.

    Returns:
        values (blocks, block), index (blocks, 2) int64 = (first row, column), ascending.
    """
    rows, cols = rest.shape
    cube = rest.reshape(rows // block, block, cols)
    weight = cube.square().sum(dim=1).reshape(-1)
    places = weight.topk(blocks).indices.sort().values
    return gather(rest, torch.stack([places // cols * block, places % cols], dim=1), block)


def gather(matrix: Tensor, index: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The values that `matrix` has in the blocks `index`, and the index itself."""
    rows = index[:, :1] + torch.arange(block)
    return matrix[rows, index[:, 1:]], index


def add_overlay(dense: Tensor, values: Tensor, index: Tensor) -> None:
    """Adds the blocks to (rows, cols) in place; every block stands for itself, none overlap."""
    rows = index[:, :1] + torch.arange(values.shape[1])
    dense[rows, index[:, 1:]] += values
