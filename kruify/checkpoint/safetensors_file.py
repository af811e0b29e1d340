"""Read .safetensors: a length, a JSON header, the numbers.

The safetensors library checks the header (offsets, overlaps, dtypes); the numbers are then read tensor by tensor from a
file handle, so that a file larger than the memory can be copied and replaced while it is open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.file_bytes import AGAIN, chunks, parse_json, read_at
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import CHECKSUM, DTYPES
from kruify.errors import CorruptError, UnsafeError, UnsupportedError, first_line

_DTYPE = {text: dtype for dtype, text in DTYPES.items()}


def read_safetensors(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors and metadata of an open .safetensors file.

    Raises:
        CorruptError: the header is damaged, or the file is cut short, or a checksum that kruify wrote does not match.
        UnsafeError: the header is beyond the limits.
        UnsupportedError: a dtype that torch cannot hold.
    """
    length, header = _read_header(path, file, size)
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > limits.ENTRIES:
        raise UnsafeError(f"it names {len(header)} tensors, more than {limits.ENTRIES}", path)
    tensors: dict[str, LazyTensor] = {}
    for name, entry in header.items():
        if len(name) > limits.NAME:
            raise UnsafeError(f"it has a tensor whose name is {len(name)} characters long", path)
        dtype = _DTYPE.get(entry["dtype"])
        if dtype is None:
            raise UnsupportedError(f"{name[:80]} has the dtype {entry['dtype'][:20]}, which kruify cannot hold", path)
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        tensors[name] = LazyTensor(shape, dtype, _loader(path, file, 8 + length + start, end - start, dtype, shape))
    if CHECKSUM in metadata:
        _check_checksum(path, file, length, metadata[CHECKSUM])
    elif "kruify.schema" in metadata:
        raise CorruptError("its checksum is missing", path, "Convert the source again")
    return tensors, {name: text for name, text in metadata.items() if name != CHECKSUM}


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise CorruptError("it is cut short inside its header", path, AGAIN)
    if length > limits.HEADER:
        raise UnsafeError(f"its header claims {length} bytes, more than {limits.HEADER}", path)
    text = file.read(length)
    header: dict[str, Any] = parse_json(text, "its header", path)
    try:
        with safe_open(path, framework="pt"):  # the library's own checks, before any number is read
            pass
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptError(f"its header is damaged ({first_line(error)})", path, AGAIN) from error
    return length, header


def _loader(
    path: Path, file: BinaryIO, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(read_at(path, file, start, size), dtype=dtype).reshape(shape)

    return load


def _check_checksum(path: Path, file: BinaryIO, length: int, expected: str) -> None:
    """Compare the checksum over the whole file, itself taken as zeros, that `write_safetensors` puts in."""
    file.seek(0)
    header = file.read(8 + length)
    digest = hashlib.sha256(header.replace(expected.encode(), b"0" * len(expected)))
    for chunk in chunks(file):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CorruptError("its checksum does not match its contents", path, "Convert the source again")
