"""Tensors as integers with scales, of eight or four bits, and in float32 again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint.file_format import AGAIN
from kruify.checkpoint.sparse_index import checked_counts
from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.errors import CorruptError, UnsupportedError
from kruify.quantization import (
    EQUAL_LEVELS,
    LARGEST,
    LEVELS,
    SCALES,
    dequantize,
    in_pairs,
    pack,
    pays,
    quantize_groups,
    quantize_rows,
    row_dims,
    unpack,
)

SCALE = ".scale"
"""What follows the name of a tensor of integers in that of its scales. No parameter of a torch module has a name that
begins with another parameter's and a dot."""
HELD = (torch.int8, torch.uint8)
"""The dtypes of integers in a file: one or two to a byte."""


def integer_dims(
    name: str, tensor: LazyTensor, matrix: str | None, others: Mapping[str, LazyTensor]
) -> tuple[int, ...]:
    """The dimensions that a row of a tensor runs over if it is stored as integers, () where they are not for it:
    vectors, complex and whole numbers, rows of one entry. `matrix` is the Kronecker matrix that it is an entry of,
    among the `others` are the factors beside it."""
    if not tensor.dtype.is_floating_point or len(tensor.shape) < 2 or (matrix and len(tensor.shape) != 4):
        return ()  # of a Kronecker matrix, diagonal and scales have one vector a gate
    dims = row_dims(tensor.shape, matrix is not None, matrix is not None and _shares(name, tensor, others))
    return dims if pays(tensor.shape, dims) else ()


def _shares(name: str, factor: LazyTensor, others: Mapping[str, LazyTensor]) -> bool:
    """Whether the gates of a factor share another one of their term."""
    term = name.rpartition(".")[0]
    beside = (others.get(f"{term}.{f}") for f in range(2))
    return any(other is not None and other.shape[0] < factor.shape[0] for other in beside)


def integers(
    name: str,
    tensor: LazyTensor,
    dims: tuple[int, ...],
    dtype: str,
    packed: bool,
    known: MutableMapping[str, Tensor],
) -> dict[str, LazyTensor]:
    """A tensor, and its scales, stored as `dtype`, one of `INTEGERS`; four bits are for rows of an even number of
    entries (`in_pairs`), others get eight.

    Args:
        packed: two integers of four bits share a byte.
        known: the scales to take for four bits, by name; where there are none, those that are found are added.
    """
    if not in_pairs(tensor.shape, dims):
        dtype = "int8"
    packed = packed and dtype == "int4"

    def part(which: int) -> Callable[[], Tensor]:
        def quantized() -> tuple[Tensor, Tensor]:
            both = quantize_rows(tensor.load(), dims, dtype, known.get(name))
            if dtype == "int4":  # a search; the scales of eight bits follow the largest magnitudes
                known[name] = both[1]
            return both

        return lambda: _named(name, quantized)[which]

    values, scales = part(0), tuple(1 if d in dims else n for d, n in enumerate(tensor.shape))
    shape = tuple(n // 2 if packed and d == dims[-1] else n for d, n in enumerate(tensor.shape))
    held = torch.uint8 if packed else torch.int8
    return {
        name: LazyTensor(
            shape,
            held,
            lambda: pack(values(), dims[-1]) if packed else values(),
            derived(dtype, held, dims, tensor.identity),
        ),
        name + SCALE: LazyTensor(scales, SCALES, part(1), derived("scale", dtype, dims, tensor.identity)),
    }


def integer_blocks(name: str, values: LazyTensor, index: LazyTensor, rows: int) -> dict[str, LazyTensor]:
    """A sparse residual's values (blocks, height) as int8 with one scale for all blocks that begin in one row."""
    height = values.shape[1]

    def part(which: int) -> Callable[[], Tensor]:
        def quantized() -> tuple[Tensor, Tensor]:
            return quantize_groups(values.load(), index.load()[:, 0].long() // height, rows // height)

        return lambda: _named(name, quantized)[which]

    both = values.identity, index.identity
    return {
        name: LazyTensor(values.shape, torch.int8, part(0), derived("int8", *both)),
        name + SCALE: LazyTensor((rows // height, 1), SCALES, part(1), derived("scale", *both)),
    }


def restored(
    values: LazyTensor, scale: LazyTensor | None, counts: LazyTensor | None, where: str, equal: bool = False
) -> LazyTensor:
    """The float32 tensor of what `integers` gave, or with the `counts` of its index `integer_blocks`.

    Args:
        equal: integers of four bits are `EQUAL_LEVELS`.

    Raises:
        CorruptError: scales or counts do not fit; on loading, numbers that neither gives.
    """
    if scale is None or scale.dtype not in (SCALES, torch.float32):  # float32 in schema 2
        raise CorruptError("it is of integers and has no scales", where, AGAIN)
    shape, dim, least = values.shape, 0, -LARGEST
    if packed := values.dtype == torch.uint8:
        dim = max((d for d, n in enumerate(shape) if n > 1), default=0)  # rows are longer than two (`in_pairs`)
        least = -7 if equal else least
        shape = tuple(2 * n if d == dim else n for d, n in enumerate(shape))
    groups = scale.shape if counts is None else (*counts.shape, 1)
    alike = len(groups) == len(shape) and all(
        a in (1, b) for a, b in zip(groups[counts is not None :], shape[counts is not None :], strict=True)
    )
    if scale.shape != groups or not alike:
        raise CorruptError(f"its scales are of shape {list(scale.shape)}, which does not fit it", where, AGAIN)

    def load() -> Tensor:
        numbers, factor = values.load(), scale.load()
        numbers = unpack(numbers, dim, EQUAL_LEVELS if equal else LEVELS) if packed else numbers
        if bool((numbers < least).any()):
            raise CorruptError(f"it has integers outside of {least} to {-least}", where, AGAIN)
        positive = bool((factor > 0).all())
        if counts is not None:
            factor = factor.repeat_interleave(checked_counts(counts, shape[0], where), dim=0)
        found = dequantize(numbers, factor)
        if not (positive and bool(found.isfinite().all())):
            raise CorruptError("it has scales that are not positive and finite", where, AGAIN)
        return found

    parts = [part.identity for part in (values, scale, counts) if part is not None]
    return LazyTensor(shape, torch.float32, load, derived("float32", *parts))


def _named(name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except UnsupportedError as error:
        raise UnsupportedError(error.what, name, "Use a checkpoint from before training diverged") from None
