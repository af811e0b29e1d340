"""Read numpy .npz archives; object arrays, which are pickles, are refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kruify.checkpoint.archive import AGAIN, Archive
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

HEADER = 10_000
"""Characters of an array's header; numpy's own limit."""


def read_npz(path: Path, archive: Archive) -> dict[str, LazyTensor]:
    """Arrays by name.

    Raises: UnsafeError for object arrays, UnsupportedError for dtypes that torch does not have, CorruptError.
    """
    return {name.removesuffix(".npy"): _array(path, archive, name) for name in archive.entries}


def _array(path: Path, archive: Archive, name: str) -> LazyTensor:
    size = archive.entries[name].file_size
    head = b""
    for chunk in archive.chunks(name):
        head += chunk[: HEADER + 64]
        break
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=HEADER)
    except (ValueError, TypeError, SyntaxError, EOFError, MemoryError, RecursionError) as error:
        raise CorruptError(f"its array {name[:80]} has a damaged header", path, AGAIN) from error
    if dtype.hasobject:
        raise UnsafeError(f"its array {name[:80]} is a pickle", path, "Save arrays of numbers only")
    if any(n < 0 for n in shape) or stream.tell() + prod(shape) * dtype.itemsize != size:
        raise CorruptError(f"its array {name[:80]} does not have the size of its shape {list(shape)}", path, AGAIN)
    try:
        kind = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise UnsupportedError(f"its array {name[:80]} has dtype {dtype}", path) from error
    return LazyTensor(tuple(shape), kind, _loader(archive, name, stream.tell(), dtype, shape, fortran))


def _loader(
    archive: Archive, name: str, start: int, dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        data = bytearray().join(archive.chunks(name))
        array = np.frombuffer(data, dtype=dtype, offset=start).astype(dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(array.reshape(shape, order="F" if fortran else "C")))

    return load
