"""Read what torch.save and torch.jit.save write, without running it: zip archives and the older plain files.

torch.load is not used here, not even with weights_only=True: the safe unpickler does less than that, it reads one
tensor at a time, and it opens the full modules and TorchScript archives that weights_only refuses. The tests hold it
against torch.load(weights_only=True).

Layout of a zip: NAME/data.pkl, NAME/data/KEY per storage, NAME/byteorder; TorchScript adds NAME/code/ and
NAME/constants.pkl. Layout of an older file (before torch 1.6): five pickles (magic number, protocol, system, object,
storage keys), then each storage as an eight-byte count and its numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kruify.checkpoint import limits
from kruify.checkpoint.archive import Archive
from kruify.checkpoint.file_bytes import AGAIN, read_at
from kruify.checkpoint.safe_unpickler import unpickle
from kruify.checkpoint.storage import Read, Storage, rebuilders, storage_dtype
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


@dataclass
class TorchFile:
    """What a torch file holds: the object with tensors as LazyTensors, classes as Records."""

    root: Any
    globals: set[str] = field(default_factory=set)
    code: dict[str, str] = field(default_factory=dict)  # TorchScript: path below code/ -> source


def read_zip(path: Path, archive: Archive) -> TorchFile:
    """The object in a torch zip archive.

    Raises: UnsafeError, CorruptError, UnsupportedError as `read` says.
    """
    pickles = [name for name in archive.entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CorruptError("its archive is not one that torch writes", path, "Give a checkpoint")
    top = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{top}byteorder", 16) if f"{top}byteorder" in archive else b"little"
    storages: dict[str, Storage] = {}

    def reader(base: int) -> Read:
        return lambda start, length: read_at(path, archive.file, base + start, length)

    def persistent(identifier: Any) -> Storage:
        kind, cls, key, _location, count = identifier
        if kind != "storage" or not isinstance(key, str) or type(count) is not int:
            raise CorruptError("its pickle refers to something that is no storage", path)
        entry = archive.entries.get(f"{top}data/{key}")
        if entry is None:
            raise CorruptError(f"its archive lacks the storage {key[:80]}", path, AGAIN)
        dtype = storage_dtype(cls, path)
        if entry.file_size != count * dtype.itemsize:
            raise CorruptError(f"its storage {key[:80]} has {entry.file_size} bytes, not {count} numbers", path, AGAIN)
        if key in storages and storages[key].dtype != dtype:
            raise CorruptError(f"its storage {key[:80]} has two dtypes", path, AGAIN)
        if key not in storages:
            start = archive.start(entry.filename)
            storages[key] = Storage(key, dtype, entry.file_size, reader(start), order == b"big", start)
        return storages[key]

    found = TorchFile(None)
    found.root, _ = unpickle(
        archive.read(pickles[0], limits.PICKLE),
        where=path,
        persistent=persistent,
        rebuild=rebuilders(path),
        globals_found=found.globals,
    )
    for name in archive.entries:
        if name.startswith(f"{top}code/") and name.endswith(".py"):
            found.code[name.removeprefix(f"{top}code/")] = archive.read(name, limits.PICKLE).decode("utf-8", "replace")
    return found


def is_torchscript(archive: Archive) -> bool:
    """Whether torch.jit.save wrote the archive."""
    return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.entries)


def is_legacy(head: bytes) -> bool:
    """Whether a file starts with torch's magic number, pickled."""
    return head[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in head


def read_legacy(path: Path, file: BinaryIO, size: int) -> TorchFile:
    """The object in a file of before torch 1.6 (or _use_new_zipfile_serialization=False). It has no checksums.

    Raises: UnsafeError, CorruptError, UnsupportedError as `read` says.
    """
    file.seek(0)
    data = file.read(limits.PICKLE)  # the pickles come first; the storages may be larger than the memory
    at = 0
    header: list[Any] = []
    for _ in range(3):
        value, used = unpickle(data[at : at + 4096], where=path)
        header.append(value)
        at += used
    if header[:2] != [MAGIC, PROTOCOL] or not isinstance(header[2], dict):
        raise CorruptError("its header is damaged", path, AGAIN)
    storages: dict[str, Storage] = {}
    swap = not header[2].get("little_endian", True)

    def persistent(identifier: Any) -> Any:
        if identifier[0] == "module":  # (class, its file, its source): the class is all that counts
            return identifier[1]
        kind, cls, key, _location, count, *views = identifier
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise CorruptError("its pickle refers to something that is no storage", path)
        if views and views[0] is not None:
            raise UnsupportedError("it holds views of storages, as torch before 0.4 wrote them", path, "Save it again")
        dtype = storage_dtype(cls, path)
        if count * dtype.itemsize > size:
            raise CorruptError(f"its storage {key[:80]} claims {count} numbers", path, AGAIN)
        if key in storages and (storages[key].dtype, storages[key].nbytes) != (dtype, count * dtype.itemsize):
            raise CorruptError(f"its storage {key[:80]} has two sizes", path, AGAIN)

        def read(start: int, length: int) -> bytearray:
            return read_at(path, file, storages[key].start + start, length)

        return storages.setdefault(key, Storage(key, dtype, count * dtype.itemsize, read, swap))

    found = TorchFile(None)
    found.root, used = unpickle(
        data[at:], where=path, persistent=persistent, rebuild=rebuilders(path), globals_found=found.globals
    )
    at += used
    keys, used = unpickle(data[at:], where=path)
    at += used
    if (
        not isinstance(keys, list)
        or len(keys) > limits.ENTRIES
        or not all(isinstance(key, str) for key in keys)
        or set(keys) != set(storages)
    ):
        raise CorruptError("its list of storages does not match its tensors", path, AGAIN)
    for key in keys:
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        if storages[key].start >= 0 or count * storages[key].dtype.itemsize != storages[key].nbytes:
            raise CorruptError(f"its storage {key[:80]} has two sizes", path, AGAIN)
        storages[key].start = at + 8
        at += 8 + storages[key].nbytes
    if at != size:
        raise CorruptError("it is cut short" if at > size else "it has something after its end", path, AGAIN)
    return found


def refuse_plain_pickle(path: Path, file: BinaryIO, size: int) -> None:
    """Say what a pickle is that torch did not write: unsafe, damaged, or not supported."""
    if size > limits.PICKLE:
        raise UnsafeError(f"it is a plain pickle of {size} bytes", path, "Save it with torch.save")
    file.seek(0)
    unpickle(file.read(), where=path, rebuild=rebuilders(path))
    raise UnsupportedError("it is a plain pickle, not written by torch.save", path, "Save it with torch.save")
