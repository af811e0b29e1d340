"""Quantisation to eight or four bits, one scale per row: value = scale * integer, the integers all from -127 to 127, or
sixteen of them (`LEVELS`).

A scale of eight bits is the bfloat16 nearest to the row's largest magnitude / 127: near enough for this magnitude to
become 127, and of few enough bits for scale * integer to be exact in float32. One of four bits makes the largest
magnitude any level, or clips it, whichever leaves the smallest sum of squared errors. Quantising what was dequantised
therefore gives the same numbers, and no scale is kept in memory.
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

INTEGERS = ("int8", "int4")
"""The dtypes that have scales."""

LARGEST = 127
"""The largest integer."""

LEVELS = torch.tensor([-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127], dtype=torch.int8)
"""The integers of int4, by the four bits that stand for them: 127 times the levels of NF4 (Dettmers et al. 2023,
appendix E), as near to each other as weights of a normal distribution are, with a third less squared error than fifteen
equal steps (benchmarks/recovery)."""

EQUAL_LEVELS = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.int8)
"""Those of files of schema 5; -8 stood for nothing there."""

SCALES = torch.bfloat16
"""The dtype of scales."""
CLIPPED = (0.9, 0.8, 0.7, 0.6)  # shares of a row's largest magnitude that can become 127 in four bits
LEAST_SCALE = 2.0**-126  # the smallest normal float32: a row of zeros has a scale, too
BLOCK = 1 << 16  # numbers that the search for scales works on at once: they stay in a cache

# All places between two levels are multiples of a half, so that ceil(2 * x) tells which is the nearest to x, of two the
# lower one: much faster than torch.bucketize.
_ENDS = torch.arange(-2 * LARGEST, 2 * LARGEST + 1) / 2
_NEAREST = LEVELS[torch.bucketize(_ENDS, (LEVELS[1:].float() + LEVELS[:-1].float()) / 2)]


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


def scale_of(largest: Tensor, integer: int = LARGEST) -> Tensor:
    """bfloat16 scales of rows whose largest magnitudes, of any shape, become this integer."""
    return (largest.float() / integer).clamp(min=LEAST_SCALE).to(SCALES)


def quantize_rows(
    tensor: Tensor, dims: Sequence[int], dtype: str = "int8", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A real tensor as integers and scales.

    Args:
        dims: the dimensions that a row runs over (`row_dims`).
        dtype: one of `INTEGERS`.
        scale: the scales to take; None for those that are found.

    Returns:
        int8 values in the shape of the tensor, and bfloat16 scales in that shape but 1 in `dims`. Their product is the
        nearest to the tensor that these scales allow.

    Raises:
        UnsupportedError: an entry is NaN or infinite, or beyond float32.
    """
    tensor = tensor.detach().float()
    largest = _finite(tensor.abs().amax(tuple(dims), keepdim=True))
    if scale is None:
        scale = _best_scale(tensor, dims, largest) if dtype == "int4" else scale_of(largest)
    return _integers(tensor, scale, dtype), scale


def _finite(largest: Tensor) -> Tensor:
    """The largest magnitudes of rows, as they are; UnsupportedError where one is NaN or infinite."""
    if not bool(largest.isfinite().all()):
        raise UnsupportedError("entries that are NaN or infinite cannot be integers with a scale")
    return largest


def _integers(tensor: Tensor, scale: Tensor, dtype: str = "int8") -> Tensor:
    """int8: of tensor / scale the nearest, half to even, or of `LEVELS` the nearest."""
    if dtype == "int4":
        bound = 2 * LARGEST
        places = (tensor.float() / scale).mul_(2).ceil_().clamp_(-bound, bound).add_(bound).int()
        return _NEAREST.to(tensor.device).index_select(0, places.flatten()).view_as(places)
    return (tensor.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def _best_scale(tensor: Tensor, dims: Sequence[int], largest: Tensor) -> Tensor:
    """The scales of four bits, the first ones for each row that leave the smallest sum of squared errors."""
    dim = next(d for d in range(tensor.ndim) if d not in dims)
    count = max(1, BLOCK * tensor.shape[dim] // tensor.numel())
    blocks = zip(torch.split(tensor, count, dim), torch.split(largest, count, dim), strict=True)
    return torch.cat([_best_of_block(rows, dims, most) for rows, most in blocks], dim)


def _best_of_block(tensor: Tensor, dims: Sequence[int], largest: Tensor) -> Tensor:
    """`_best_scale`, of few rows."""
    largest = largest.clamp(min=LEAST_SCALE)
    unit = torch.frexp(largest).mantissa / largest  # a power of two: no square is too large or too small for float32
    integers = sorted({abs(level) for level in LEVELS.tolist()} - {0}, reverse=True)
    found = [scale_of(largest, integer) for integer in integers] + [scale_of(share * largest) for share in CLIPPED]
    best, least = found[0], torch.full_like(largest, torch.inf)
    for scale in found:
        wrong = (dequantize(_integers(tensor, scale, "int4"), scale) - tensor) * unit
        error = wrong.square().sum(tuple(dims), keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def in_pairs(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether integers of rows over `dims` can be stored two to a byte: along the last one, which has an even number of
    entries, more than two."""
    return shape[dims[-1]] > 2 and shape[dims[-1]] % 2 == 0


def pack(values: Tensor, dim: int) -> Tensor:
    """int8 values out of `LEVELS` as uint8, two to a byte: the place of the first of two neighbours along `dim` in the
    lower half."""
    places = torch.searchsorted(LEVELS.to(values.device), values.contiguous())
    shape = places.shape
    first, second = places.reshape(*shape[:dim], -1, 2, *shape[dim + 1 :]).unbind(dim + 1)
    both: Tensor = first | second << 4
    return both.to(torch.uint8)


def unpack(packed: Tensor, dim: int, levels: Tensor = LEVELS) -> Tensor:
    """The inverse of `pack`."""
    places = torch.stack([packed & 15, packed >> 4], dim + 1).flatten(dim, dim + 1)
    return levels.to(packed.device)[places.long()]


def quantize_groups(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, one scale for all rows of a group.

    Args:
        values: (rows, any), for instance the blocks of a sparse residual; group: int64 (rows,), the group of each.

    Returns:
        int8 values, and bfloat16 scales (groups, 1).
    """
    values = values.detach().float()
    largest = values.new_zeros(groups).scatter_reduce(0, group, values.abs().amax(1), "amax")
    scale = scale_of(_finite(largest))[:, None]
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
