"""The sparse residual: blocks of consecutive rows in one column, the largest of what the other parts leave."""

from __future__ import annotations

import torch
from torch import Tensor

Blocks = tuple[Tensor, Tensor]
"""values (blocks, block), index (blocks, 2) int64 = (first row, column), ascending."""


def heaviest(weight: Tensor, blocks: int) -> Tensor:
    """The places of the `blocks` largest entries of (rows / block, cols), as (blocks, 2) ascending.

    Ties go to the earlier place, so that the result is the same everywhere.
    """
    flat = weight.reshape(-1)
    if blocks == 0:
        return flat.new_empty(0, 2, dtype=torch.int64)
    # A full sort would be stable, and take most of the time of a search.
    least = flat.topk(blocks, sorted=False).values.min()
    above = (flat > least).nonzero()[:, 0]
    equal = (flat == least).nonzero()[: blocks - len(above), 0]
    places = torch.cat([above, equal]).sort().values
    return torch.stack([places // weight.shape[1], places % weight.shape[1]], dim=1)


def largest_blocks(rest: Tensor, blocks: int, block: int) -> Blocks:
    """The `blocks` blocks of `block` rows x 1 column of (rows, cols) that hold the most energy."""
    rows, cols = rest.shape
    weight = rest.reshape(rows // block, block, cols).square().sum(dim=1)
    index = heaviest(weight, blocks) * torch.tensor([block, 1])
    return rest[_rows(index, block), index[:, 1:]], index


def add_blocks(dense: Tensor, values: Tensor, index: Tensor) -> None:
    """Adds the blocks to (rows, cols) in place; no two blocks overlap."""
    dense[_rows(index, values.shape[1]), index[:, 1:]] += values


def _rows(index: Tensor, block: int) -> Tensor:
    return index[:, :1] + torch.arange(block)
