"""Read .safetensors: a length, a JSON header, the numbers.

The safetensors library checks the header (offsets, overlaps, dtypes); the numbers are then read tensor by tensor from a
file handle, so that a file larger than the memory can be copied and replaced while it is open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import CHECKSUM, DTYPES
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

CHUNK = 1 << 22
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
        raise CorruptError("it is cut short inside its header", path, "Copy or download it again")
    if length > limits.HEADER:
        raise UnsafeError(f"its header claims {length} bytes, more than {limits.HEADER}", path)
    text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        with safe_open(path, framework="pt"):  # the library's own checks, before any number is read
            pass
    except RecursionError as error:
        raise UnsafeError("its header is nested too deeply", path) from error
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CorruptError(f"its header is damaged ({reason})", path, "Copy or download it again") from error
    return length, header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name appears twice")
    return table


def _loader(
    path: Path, file: BinaryIO, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(size)
        file.seek(start)
        if file.readinto(data) != size:  # type: ignore[attr-defined]
            raise CorruptError("it became shorter while it was read", path, "Do not write to it meanwhile")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return load


def _check_checksum(path: Path, file: BinaryIO, length: int, expected: str) -> None:
    """Compare the checksum over the whole file, itself taken as zeros, that `write_safetensors` puts in."""
    file.seek(0)
    header = file.read(8 + length)
    digest = hashlib.sha256(header.replace(expected.encode(), b"0" * len(expected)))
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CorruptError("its checksum does not match its contents", path, "Convert the source again")
