"""Read numpy .npz archives; object arrays, which are pickles, are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kruify.checkpoint.archive import Archive
from kruify.checkpoint.file_bytes import AGAIN
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
    shape, fortran, dtype, start = _header(path, name, head)
    if dtype.hasobject:
        raise UnsafeError(f"its array {name[:80]} is a pickle", path, "Save arrays of numbers only")
    if any(n < 0 for n in shape) or start + prod(shape) * dtype.itemsize != size:
        raise CorruptError(f"its array {name[:80]} does not have the size of its shape {list(shape)}", path, AGAIN)
    try:
        kind = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise UnsupportedError(f"its array {name[:80]} has dtype {dtype}", path) from error
    return LazyTensor(tuple(shape), kind, _loader(archive, name, start, dtype, shape, fortran))


_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z]\d{0,3})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,18},? ?)*)\), \}\s*"
)


def _header(path: Path, name: str, head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of an array's header.

    numpy writes the header as a Python expression and evaluates it as a literal; here it is matched as text.
    """
    width = {b"\x01": 2, b"\x02": 4, b"\x03": 4}.get(head[6:7])
    if head[:6] != b"\x93NUMPY" or width is None:
        raise CorruptError(f"its array {name[:80]} is no array", path, AGAIN)
    start = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    text = head[8 + width : start]
    if b"'descr': [" in text:
        raise UnsupportedError(f"its array {name[:80]} has fields", path, "Save arrays of numbers only")
    match = _HEADER.fullmatch(text)
    if start > len(head) or match is None:
        raise CorruptError(f"its array {name[:80]} has a damaged header", path, AGAIN)
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError as error:
        raise CorruptError(f"its array {name[:80]} has a damaged header", path, AGAIN) from error
    return tuple(int(n) for n in re.findall(rb"\d+", match[3])), match[2] == b"True", dtype, start


def _loader(
    archive: Archive, name: str, start: int, dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        data, at = bytearray(prod(shape) * dtype.itemsize), -start
        for chunk in archive.chunks(name):
            data[max(at, 0) : max(at + len(chunk), 0)] = chunk[max(-at, 0) :]
            at += len(chunk)
        array = np.frombuffer(data, dtype=dtype)
        array = array.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(shape)  # it makes a vector of one number

    return load
