"""Symmetric quantisation to eight bits, one scale per row: value = scale * integer, the integers from -127 to 127.

A scale is the bfloat16 nearest to the row's largest magnitude / 127: near enough for this magnitude to become 127, and
of few enough bits for scale * integer to be exact in float32. Quantising what was dequantised therefore gives the same
integers and scales, and no scale is kept in memory.
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
}
"""The dtypes that a weight can be stored in; all are computed in float32."""

SCALES = torch.bfloat16
"""The dtype of scales."""
LARGEST = 127
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


def scale_of(largest: Tensor) -> Tensor:
    """bfloat16 scales of rows whose largest magnitudes are given, any shape.

    Raises:
        UnsupportedError: one of them is NaN or infinite.
    """
    if not bool(largest.isfinite().all()):
        raise UnsupportedError("entries that are NaN or infinite have no eight-bit form")
    return (largest.float() / LARGEST).clamp(min=LEAST_SCALE).to(SCALES)


def _integers(tensor: Tensor, scale: Tensor) -> Tensor:
    """int8: tensor / scale, to the nearest, half to even."""
    return (tensor.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def quantize_rows(tensor: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A real tensor as integers and scales.

    Args:
        dims: the dimensions that a row runs over (`row_dims`).

    Returns:
        int8 values in the shape of the tensor, and bfloat16 scales in that shape but 1 in `dims`. Their product differs
        from the tensor by at most half a scale.

    Raises:
        UnsupportedError: an entry is NaN or infinite, or beyond float32.
    """
    tensor = tensor.detach().float()
    scale = scale_of(tensor.abs().amax(tuple(dims), keepdim=True))
    return _integers(tensor, scale), scale


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
        UnsupportedError: an entry is NaN or infinite, or beyond float32 (int8 only).
    """
    if dtype == "int8":
        return dequantize(*quantize_rows(tensor, dims)).to(tensor.dtype)
    return tensor.detach().to(DTYPES[dtype]).to(tensor.dtype)
