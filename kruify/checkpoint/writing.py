"""Write checkpoints all or nothing: a temporary file beside the target, flushed to disk, then renamed over it.

A reader sees the old file whole or the new one whole, also after a crash or a full disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kruify.checkpoint.file_bytes import to_text
from kruify.checkpoint.tensors import LazyTensor, Tensors, ties
from kruify.errors import UnsupportedError, UsageError
from kruify.progress import Progress

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
"""The dtypes of the safetensors format."""

CHECKSUM = "kruify.checksum"
TIES = "kruify.ties"
"""The metadata entry of a safetensors file for second names of its tensors: the format has each tensor once."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends without an error, and leaves no trace when it does not.

    A symbolic link stays a link: the file that it points to is replaced.

    Raises:
        UsageError: the folder is missing or read-only, the disk is full, or `path` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise UsageError("it is not a regular file", path, "Name a file to write to")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(target.parent)


def move_files(files: Iterable[Path], folder: Path) -> None:
    """Moves files into a folder of the same disk, over those of their names: all of them or, where one cannot be
    moved, none. Each name has its old file until the new one takes its place.

    Raises:
        UsageError: one cannot be moved.
    """
    placed = list[Path]()
    try:
        with tempfile.TemporaryDirectory(prefix=".kruify.", dir=folder) as spare:
            try:
                for file in files:
                    target = folder / file.name
                    if target.is_file():
                        _keep(target, Path(spare, file.name))
                    os.replace(file, target)
                    placed.append(target)
            except BaseException:  # an interruption, too
                for target in placed:
                    old = Path(spare, target.name)
                    if old.exists():
                        os.replace(old, target)
                    else:
                        target.unlink()
                raise
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _keep(file: Path, other: Path) -> None:
    """Gives a file a second name, or a copy where the disk has no hard links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a .safetensors file, one tensor in memory at a time; same input, same bytes.

    Args:
        tensors: name -> tensor, or -> LazyTensor, or the `tensors` of a Checkpoint.
        metadata: strings; a file whose metadata has `kruify.schema` gets a checksum over all its bytes, too, and tied
            tensors are written once.

    Raises:
        UnsupportedError: a dtype that the format does not know.
        UsageError: the file cannot be written.
    """
    lazy, strings = _held(as_lazy(tensors), metadata)
    header, order = _header(lazy, strings, path)
    total, written = sum(tensor.nbytes for tensor in lazy.values()), 0
    with atomic_file(path) as file:
        digest = hashlib.sha256(header)
        file.write(header)
        for name in order:
            data = tensor_bytes(_loaded(lazy[name], name, path))
            file.write(data)
            digest.update(data)
            written += len(data)
            del data  # before the next tensor is loaded
            if progress:
                progress(written, total, "writing")
        if CHECKSUM in strings:
            # The checksum stands in the header, before the data that it covers: hashed as zeros, then filled in.
            start = header.index(b'"%s":"%s"' % (CHECKSUM.encode(), b"0" * 64)) + len(CHECKSUM) + 4
            file.seek(start)
            file.write(digest.hexdigest().encode())


def safetensors_bytes(tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file that `write_safetensors` writes; no tensor is loaded."""
    lazy, strings = _held(as_lazy(tensors), metadata)
    header, _ = _header(lazy, strings, "safetensors")
    return len(header) + sum(tensor.nbytes for tensor in lazy.values())


def write_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
    extras: Mapping[str, Any] | None = None,
    before: int = 0,
    links: Mapping[str, str] | None = None,
    legacy: bool = False,
) -> None:
    """Write a .pt file that torch.load(weights_only=True) reads; same input, same bytes.

    Without key and metadata the file is the plain state dict. With a key it is nested under it, beside `extras`, of
    which `before` come first; with metadata it is nested under "state_dict", beside "kruify". Every tensor gets a
    storage of its own, but for `links`: second name -> first name.
    legacy: the format of before torch 1.6; its bytes are not the same each time, as torch puts addresses in it.
    """
    lazy = as_lazy(tensors)
    links = links or {}
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in lazy.items():
        if name not in links or links[name] not in lazy:
            state[name] = _loaded(tensor, name, path).detach().cpu().clone(memory_format=torch.contiguous_format)
    tree: Any = OrderedDict((name, state[links.get(name, name)] if name not in state else state[name]) for name in lazy)
    if metadata:
        key = key or "state_dict"
    if key:
        for part in reversed([key] if "." not in key else key.split(".")):
            tree = {part: tree}
        beside = list((extras or {}).items())
        tree = {**dict(beside[:before]), **tree, **dict(beside[before:])}
        if metadata:
            tree["kruify"] = dict(metadata)
    with atomic_file(path) as file:
        save_tree(tree, file, legacy=legacy)


def save_tree(tree: Any, file: BinaryIO, *, legacy: bool = False) -> None:
    """torch.save that reports a full disk as an OSError, and not as an error of torch's, raised while it handles that.

    Args:
        legacy: the format of before torch 1.6.
    """
    try:
        torch.save(tree, file, _use_new_zipfile_serialization=not legacy)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def as_lazy(tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """The same names, nothing loaded that is not loaded already."""
    if isinstance(tensors, Tensors):
        return dict(tensors.lazy)
    if empty := [name for name, t in tensors.items() if isinstance(t, Tensor) and t.is_meta]:
        raise UsageError("it has no numbers: it is on the meta device", empty[0], "Load a state dict with assign=True")
    return {name: t if isinstance(t, LazyTensor) else LazyTensor.of(t) for name, t in tensors.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in row-major, little-endian order."""
    flat = as_bytes(tensor)
    return memoryview(flat.numpy().data) if flat.numel() else memoryview(b"")


def as_bytes(tensor: Tensor) -> Tensor:
    """The same numbers as a vector of uint8: what can be compared and copied whatever the dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single number may have any stride
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _loaded(lazy: LazyTensor, name: str, path: object) -> Tensor:
    tensor = lazy.load()
    if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
        raise RuntimeError(
            f"{path}: {name} was announced as {lazy.shape} {lazy.dtype}, loaded {tensor.shape} {tensor.dtype}"
        )
    return tensor


def _held(
    lazy: dict[str, LazyTensor], metadata: Mapping[str, str] | None
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors and metadata as a safetensors file holds them; one of kruify's with second names and a place for the
    checksum in its metadata."""
    strings = dict(metadata or {})
    if "kruify.schema" not in strings:
        return lazy, strings
    if second := ties(lazy):
        strings[TIES] = to_text(second)
    return {name: tensor for name, tensor in lazy.items() if name not in second}, {**strings, CHECKSUM: "0" * 64}


def _header(lazy: Mapping[str, LazyTensor], metadata: Mapping[str, str], path: object) -> tuple[bytes, list[str]]:
    """Header bytes with their length, and the order of the data: wide dtypes first, so that all are aligned."""
    try:
        "".join((*lazy, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        what = "safetensors cannot hold a name or text that is no Unicode (a lone surrogate)"
        raise UnsupportedError(what, path, "Rename it, or write a .pt file") from error
    for name, tensor in lazy.items():
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"safetensors cannot hold {name} of {tensor.dtype}", path, "Write a .pt file instead"
            )
    order = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        offsets[name] = (end, end := end + lazy[name].nbytes)
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, tensor in lazy.items():
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets[name]}
    text = to_text(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or what open() would give a new one."""
    with suppress(OSError):
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot do it are left as they are."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _cannot_write(path: object, error: OSError) -> UsageError:
    reason = error.strerror or type(error).__name__
    return UsageError(
        f"it cannot be written ({reason}); nothing was changed", path, "Check the folder and the free space"
    )
