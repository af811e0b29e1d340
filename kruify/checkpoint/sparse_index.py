"""Rows and columns of a sparse residual's blocks, as a file holds them: by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.checkpoint.file_format import AGAIN
from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.errors import CorruptError, UnsupportedError

INDEX, COUNTS, COLUMNS, VALUES = (f".overlay.{part}" for part in ("index", "counts", "columns", "values"))


def compressed(matrix: str, index: LazyTensor, values: LazyTensor, size: tuple[int, int]) -> dict[str, LazyTensor]:
    """Row and column of every block -> how many blocks begin in each row that is a multiple of their height, and the
    columns (blocks,), by their names in a file.

    Args:
        matrix: full name of the Kronecker matrix.
        index, values: of its residual, (blocks, 2) and (blocks, height).
        size: rows of all gates, columns.

    Raises:
        UnsupportedError: on loading, the rows do not ascend.
    """
    (blocks, height), (rows, cols) = values.shape, size
    dtype = torch.uint16 if cols < 1 << 16 else torch.int32

    def counts() -> Tensor:
        first = index.load()[:, 0].long()
        if bool((first.diff() < 0).any()):
            raise UnsupportedError(
                "the blocks are not in ascending order of rows", matrix + INDEX, "Sort index and values"
            )
        return torch.bincount(first // height, minlength=rows // height).to(dtype)

    return {
        matrix + COUNTS: LazyTensor((rows // height,), dtype, counts, derived("counts", height, index.identity)),
        matrix + COLUMNS: LazyTensor(
            (blocks,), dtype, lambda: index.load()[:, 1].to(dtype), derived("columns", index.identity)
        ),
    }


def index_of(columns: LazyTensor, counts: LazyTensor, values: LazyTensor, where: str) -> LazyTensor:
    """Row and column of every block, (blocks, 2) int32, of what `compressed` gave and the values (blocks, height).

    Raises:
        CorruptError: they do not fit each other; the counts, on loading.
    """
    if len(counts.shape) != 1 or len(values.shape) != 2 or columns.shape != values.shape[:1]:
        raise CorruptError("the parts of its index do not fit each other", where, AGAIN)
    if {columns.dtype, counts.dtype} not in ({torch.uint16}, {torch.int32}):
        raise CorruptError("its index is of neither uint16 nor int32", where, AGAIN)
    blocks, height = values.shape

    def load() -> Tensor:
        numbers = checked_counts(counts, blocks, where)
        rows = torch.arange(len(numbers), dtype=torch.int32, device=numbers.device) * height
        rows = rows.repeat_interleave(numbers)
        return torch.stack([rows, columns.load().to(torch.int32)], dim=1)

    return LazyTensor((blocks, 2), torch.int32, load, derived("index", height, columns.identity, counts.identity))


def checked_counts(counts: LazyTensor, blocks: int, where: str) -> Tensor:
    """How many blocks begin in each row.

    Raises:
        CorruptError: they are not `blocks` in all.
    """
    found = counts.load().long()
    if bool((found < 0).any()) or int(found.sum()) != blocks:
        raise CorruptError(f"its counts do not add up to its {blocks} blocks", where, AGAIN)
    return found
