"""Open a checkpoint of any known kind: decide by its bytes what it is, never by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from kruify.checkpoint.checkpoint import Checkpoint
from kruify.checkpoint.file_format import check_schema
from kruify.checkpoint.safetensors_file import read_safetensors
from kruify.checkpoint.tensors import LazyTensor, Tensors, ties
from kruify.checkpoint.torch_file import read_torch
from kruify.checkpoint.wrapper import find_state_dict, strip
from kruify.errors import CorruptError, UsageError


def read(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint without running anything in it.

    Args:
        path: a file.
        key: the nested entry that holds the state dict, dotted; needed only where several could be meant.

    Raises:
        UsageError: there is no such file, or `key` is needed or wrong.
        UnsafeError: opening it would run something, or it asks for more than the limits.
        CorruptError: it is damaged, or no checkpoint.
        UnsupportedError: a kind, dtype or file schema that kruify does not handle.
    """
    path = Path(path)
    file, size = _open(path)
    file.seek(0)
    head = file.read(64)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _from_tree(path, "torch", read_torch(path), size, key)
    if head[8:9] == b"{":
        tensors, metadata = read_safetensors(path, file, size)
        _no_key(path, key)
        return _finish(path, "safetensors", tensors, metadata, size)
    raise CorruptError("it is not a checkpoint that kruify knows", path, "Give a .pt, .pth or .safetensors file")


def _open(path: Path) -> tuple[BinaryIO, int]:
    if path.is_dir():
        raise UsageError("it is a folder", path, "Name the checkpoint file in it")
    if not path.exists():
        raise UsageError("there is no such file", path, "Check the name")
    if not path.is_file():  # a pipe would wait, a device would never end
        raise UsageError("it is not a regular file", path, "Copy it to a file first")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"it cannot be opened ({error.strerror})", path, "Check its permissions") from error
    size = path.stat().st_size
    if not size:
        file.close()
        raise CorruptError("it is empty", path, "Copy or download it again")
    return file, size


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise UsageError(f"this kind of file is not nested, so there is no --key {key}", path, "Leave --key out")


def _from_tree(path: Path, kind: str, root: Any, size: int, key: str | None) -> Checkpoint:
    found = find_state_dict(root, key, path)
    metadata: dict[str, str] = {}
    extras = dict(found.extras)
    if isinstance(own := extras.get("kruify"), dict):
        metadata = {str(name): str(text) for name, text in own.items()}
        del extras["kruify"]
    return _finish(path, kind, found.tensors, metadata, size, key=found.key, extras=extras, dropped=found.dropped)


def _finish(
    path: Path, kind: str, tensors: dict[str, LazyTensor], metadata: dict[str, str], size: int, **rest: Any
) -> Checkpoint:
    schema = check_schema(metadata, path)
    if schema is not None:
        _check_plan(path, metadata)
        prefix, stripped = "", {name: name for name in tensors}  # a converted file says its names itself
    else:
        prefix, stripped = strip(list(tensors))
    return Checkpoint(
        path=path,
        format=kind,
        tensors=Tensors({stripped[name]: tensor for name, tensor in tensors.items()}),
        metadata=metadata,
        size=size,
        prefix=prefix,
        names={short: name for name, short in stripped.items() if short != name},
        ties={stripped[a]: stripped[b] for a, b in ties(tensors).items()},
        **rest,
    )


def _check_plan(path: Path, metadata: dict[str, str]) -> None:
    """Refuse a plan that is no JSON here, so that later rooms see JSON only."""
    try:
        json.loads(metadata.get("kruify.plan", ""))
    except (ValueError, RecursionError) as error:
        raise CorruptError("its plan is damaged", path, "Convert the source again") from error
