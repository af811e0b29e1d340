"""Symmetric quantisation to eight or four bits, one scale per row: value = scale * integer, the integers from -127 to
127 or from -7 to 7.

A scale of eight bits is the bfloat16 nearest to the row's largest magnitude / 127: near enough for this magnitude to
become 127, and of few enough bits for scale * integer to be exact in float32. One of four bits may be smaller: the
largest magnitudes become 7, where that leaves the smaller sum of squared errors. Quantising what was dequantised
therefore gives the same integers and scales, and no scale is kept in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kruify.errors import UnsupportedError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
"""The dtypes that a weight can be stored in, the widest first, and those of what a file holds: two int4 share a byte.
All are computed in float32."""

INTEGERS = {"int8": 127, "int4": 7}
"""The dtypes that have scales, and their largest integers."""

SCALES = torch.bfloat16
"""The dtype of scales."""
CLIPPED = [1 - 0.07 * step for step in range(10)]  # shares of a row's largest magnitude that can become 7
LEAST_SCALE = 2.0**-126  # the smallest normal float32: a row of zeros has a scale, too


def row_dims(shape: Sequence[int], factor: bool = False, shared: bool = False) -> tuple[int, ...]:
    """The dimensions that one row runs over.

    Args:
        shape: of a dense weight, whose rows are those of its first dimension (outputs of a matrix, entries of an
            embedding, output channels of a convolution); with `factor`, (gates, rank, P, Q), one factor of `rank`
            Kronecker products: its rows are those of each factor, and where the factor has a single column, as the
            left one of low rank, that column: these are far fewer.
        shared: of a factor: the gates share the other factors of the term, so that their columns are one.
    """
    if factor:
        return (3,) if shape[3] > 1 else (0, 2) if shared else (2,)
    return tuple(range(1, len(shape)))


def pays(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether rows over `dims` have two entries at least: an integer and a scale of its own are larger than a float."""
    return prod(shape[d] for d in dims) > 1 and prod(shape) > 0


def scale_of(largest: Tensor, dtype: str = "int8") -> Tensor:
    """bfloat16 scales of rows whose largest magnitudes are given, any shape.

    Raises:
        UnsupportedError: one of them is NaN or infinite.
    """
    if not bool(largest.isfinite().all()):
        raise UnsupportedError("entries that are NaN or infinite cannot be integers with a scale")
    return (largest.float() / INTEGERS[dtype]).clamp(min=LEAST_SCALE).to(SCALES)


def _integers(tensor: Tensor, scale: Tensor, dtype: str = "int8") -> Tensor:
    """int8: tensor / scale, to the nearest, half to even."""
    return (tensor.float() / scale).round().clamp(-INTEGERS[dtype], INTEGERS[dtype]).to(torch.int8)


def quantize_rows(tensor: Tensor, dims: Sequence[int], dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """A real tensor as integers and scales.

    Args:
        dims: the dimensions that a row runs over (`row_dims`).
        dtype: a key of `INTEGERS`.

    Returns:
        int8 values in the shape of the tensor, and bfloat16 scales in that shape but 1 in `dims`. Their product differs
        from the tensor by at most half a scale, but for what is clipped in four bits.

    Raises:
        UnsupportedError: an entry is NaN or infinite, or beyond float32.
    """
    tensor = tensor.detach().float()
    largest = tensor.abs().amax(tuple(dims), keepdim=True)
    scale = _clipping_scale(tensor, dims, largest) if dtype == "int4" else scale_of(largest, dtype)
    return _integers(tensor, scale, dtype), scale


def _clipping_scale(tensor: Tensor, dims: Sequence[int], largest: Tensor) -> Tensor:
    """The scales of four bits, one of `CLIPPED` for each row, that leave the smallest sum of squared errors."""
    best, least = scale_of(largest, "int4"), torch.full_like(largest, torch.inf)
    for share in CLIPPED:
        scale = scale_of(share * largest, "int4")
        found = dequantize(_integers(tensor, scale, "int4"), scale)
        error = (found - tensor).square().sum(tuple(dims), keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def in_pairs(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether integers of rows over `dims` can be stored two to a byte: along the last one, which has an even number of
    entries, more than two."""
    return shape[dims[-1]] > 2 and shape[dims[-1]] % 2 == 0


def pack(values: Tensor, dim: int) -> Tensor:
    """int8 values from -8 to 7 as uint8, two to a byte: the first of two neighbours along `dim` in the lower half."""
    shape = values.shape
    first, second = values.reshape(*shape[:dim], -1, 2, *shape[dim + 1 :]).unbind(dim + 1)
    both: Tensor = first & 15 | second << 4
    return both.view(torch.uint8)


def unpack(packed: Tensor, dim: int) -> Tensor:
    """The inverse of `pack`."""
    both = packed.view(torch.int8)
    return torch.stack([both << 4 >> 4, both >> 4], dim + 1).flatten(dim, dim + 1)


def quantize_groups(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, one scale for all rows of a group.

    Args:
        values: (rows, any), for instance the blocks of a sparse residual; group: int64 (rows,), the group of each.

    Returns:
        int8 values, and bfloat16 scales (groups, 1).
    """
    values = values.detach().float()
    largest = values.new_zeros(groups).scatter_reduce(0, group, values.abs().amax(1), "amax")
    scale = scale_of(largest)[:, None]
    return _integers(values, scale[group]), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """float32 values * scale, exact for what `quantize_rows` gave."""
    return values.float() * scale


def round_to(tensor: Tensor, dtype: str, dims: Sequence[int]) -> Tensor:
    """A tensor in its own dtype whose numbers are those that storing it as one of `DTYPES` keeps.

    Raises:
        UnsupportedError: an entry is NaN or infinite, or beyond float32 (integers only).
    """
    if dtype in INTEGERS:
        return dequantize(*quantize_rows(tensor, dims, dtype)).to(tensor.dtype)
    return tensor.detach().to(DTYPES[dtype]).to(tensor.dtype)
