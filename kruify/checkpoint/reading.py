"""Open a checkpoint of any known kind: decide by its bytes what it is, never by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from kruify.checkpoint import keras_file, limits, onnx_file, torch_file
from kruify.checkpoint.archive import Archive
from kruify.checkpoint.checkpoint import Checkpoint
from kruify.checkpoint.file_bytes import AGAIN, fits
from kruify.checkpoint.file_format import ORIGIN, check_metadata, check_schema, parse_origin
from kruify.checkpoint.modules import ModuleHint, ModuleTree, resolve
from kruify.checkpoint.npz_file import read_npz
from kruify.checkpoint.parametrised import compute_weights
from kruify.checkpoint.safe_unpickler import check_tree
from kruify.checkpoint.safetensors_file import read_safetensors
from kruify.checkpoint.sharded import read_index
from kruify.checkpoint.stored import decode, matrix_names, read_storage
from kruify.checkpoint.tensors import LazyTensor, Tensors, ties
from kruify.checkpoint.wrapper import find_state_dict, strip
from kruify.checkpoint.writing import TIES
from kruify.errors import CorruptError, KruifyError, UnsafeError, UnsupportedError, UsageError


@dataclass
class Contents:
    """What a reader found, names as they are in the file."""

    format: str
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, ModuleHint] = field(default_factory=dict)
    globals: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    size: int = 0
    before: int = 0
    assumed: Mapping[str, str] = field(default_factory=dict)


def read(path: str | os.PathLike[str], key: str | None = None, *, graph: bool = False) -> Checkpoint:
    """Open a checkpoint without running anything in it.

    Args:
        path: a file.
        key: the nested entry that holds the state dict, dotted; needed only where several could be meant. A file that
            kruify wrote has one state dict, whatever the key of its source was.
        graph: of an ONNX model, read the recurrent nodes that torch has no layer for, too: they are to stay in their
            graph (`onnx_file.read_model`).

    Raises:
        UsageError: there is no such file, or `key` is needed or wrong.
        UnsafeError: opening it would run something, or it asks for more than the limits.
        CorruptError: it is damaged, or no checkpoint.
        UnsupportedError: a kind, dtype or file schema that kruify does not handle.
    """
    path = Path(path)
    try:
        contents = read_contents(path, key, graph)
        return _finish(path, contents)
    except KruifyError:
        raise
    except (MemoryError, RecursionError) as error:
        raise UnsafeError(f"opening it asks for too much ({type(error).__name__})", path) from error
    except Exception as error:
        # Whatever a reader did not foresee is the file's doing: one sentence, no traceback.
        raise CorruptError(f"it is damaged ({type(error).__name__})", path, AGAIN) from error


def read_contents(path: Path, key: str | None, graph: bool = False) -> Contents:
    """The contents of a file by its kind."""
    file, size = _open(path)
    head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        contents = _from_zip(path, file, size, key)
    elif torch_file.is_legacy(head):
        contents = _from_torch(path, "torch-legacy", torch_file.read_legacy(path, file, size), key)
    elif head[8:9] == b"{":
        contents = Contents("safetensors", *read_safetensors(path, file, size))
    elif head[:8] == keras_file.SIGNATURE:
        contents = _from_keras(keras_file.read_h5(path))
    elif head.lstrip()[:1] == b"{":
        contents = _from_index(path, size)
    elif head[:1] == b"\x80":
        torch_file.refuse_plain_pickle(path, file, size)
    elif head[:1] == b"\x08":  # an ONNX model starts with its ir_version
        onnx = onnx_file.read_onnx(path, graph)
        contents = Contents("onnx", onnx.tensors, dropped=tuple(onnx.dropped), skipped=onnx.skipped, hints=onnx.hints)
        contents.shards, contents.size = onnx.outside, size + sum(file.stat().st_size for file in onnx.outside)
    elif head.startswith(b"version https://git-lfs"):
        raise CorruptError("it is a pointer of git-lfs, not the file itself", path, "Fetch it: git lfs pull")
    else:
        raise CorruptError(
            "it is not a checkpoint that kruify knows", path, "Give a PyTorch, safetensors, ONNX, Keras or .npz file"
        )
    if key is not None and contents.key is None and not any(name.startswith("kruify.") for name in contents.metadata):
        raise UsageError(f"it is not nested, so there is no --key {key}", path, "Leave --key out")
    contents.size = contents.size or size
    return contents


def _open(path: Path) -> tuple[BinaryIO, int]:
    try:
        if path.is_dir():
            raise UsageError("it is a folder", path, "Name the checkpoint file in it")
        if not path.exists():
            raise UsageError("there is no such file", path, "Check the name")
        if not path.is_file():  # a pipe would wait, a device would never end
            raise UsageError("it is not a regular file", path, "Copy it to a file first")
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"it cannot be opened ({error.strerror})", path, "Check its name and permissions") from error
    size = path.stat().st_size
    if not size:
        file.close()
        raise CorruptError("it is empty", path, AGAIN)
    return file, size


def _from_zip(path: Path, file: BinaryIO, size: int, key: str | None) -> Contents:
    archive = Archive(path, file, size)
    if archive.entries and all(name.endswith(".npy") for name in archive.entries):
        return Contents("npz", read_npz(path, archive))
    if "model.weights.h5" in archive and "config.json" in archive:
        return _from_keras(keras_file.read_archive(path, archive))
    archive.refuse_compressed()
    script = torch_file.is_torchscript(archive)
    return _from_torch(path, "torchscript" if script else "torch", torch_file.read_zip(path, archive), key)


def _from_keras(found: keras_file.KerasFile) -> Contents:
    return Contents("keras", found.tensors, skipped=found.skipped, hints=found.hints, assumed=found.assumed)


def _from_index(path: Path, size: int) -> Contents:
    def shard(file: Path) -> tuple[str, dict[str, LazyTensor]]:
        if file.name == path.name or file.name.endswith(".json"):
            raise UnsafeError("its index names an index as one of its shards", path)
        contents = read_contents(file, None)
        if contents.format not in ("safetensors", "torch", "torch-legacy"):
            raise CorruptError("it is no shard of a checkpoint", file)
        return contents.format, contents.tensors

    found = read_index(path, size, shard)
    kind = "safetensors-sharded" if found.formats == {"safetensors"} else "torch-sharded"
    total = size + sum(file.stat().st_size for file in found.shards)
    return Contents(kind, found.tensors, found.metadata, shards=found.shards, size=total)


def _from_torch(path: Path, kind: str, found: torch_file.TorchFile, key: str | None) -> Contents:
    check_tree(found.root, path)
    root = resolve(found.root, path, found.code if kind == "torchscript" else None)
    names = tuple(sorted(found.globals))
    ours = isinstance(root, Mapping) and "kruify" in root
    chosen = find_state_dict(root, None if ours else key, path)
    metadata: dict[str, str] = {}
    extras = dict(chosen.extras)
    if isinstance(own := extras.get("kruify"), dict):
        if not fits(own, {str: str}) or not all(isinstance(name, str) for name in own):
            raise CorruptError("its metadata are not all text", path, "Convert the source again")
        metadata = dict(own)
        del extras["kruify"]
    hints: Mapping[str, ModuleHint] = {}
    if isinstance(chosen.node, ModuleTree):
        hints = chosen.node.hints
        kind = kind if kind == "torchscript" else "torch-module"
    return Contents(
        kind,
        chosen.tensors,
        metadata,
        chosen.key,
        extras,
        chosen.dropped,
        hints=hints,
        globals=names,
        before=chosen.before,
    )


def _finish(path: Path, contents: Contents) -> Checkpoint:
    schema = check_schema(contents.metadata, path)
    check_metadata(contents.metadata, path)
    if TIES in contents.metadata:
        contents.tensors = _with_second_names(path, contents.tensors, json.loads(contents.metadata.pop(TIES)))
    _check_total(path, contents)
    assumed = contents.assumed
    if note := contents.metadata.get(ORIGIN):
        assumed = parse_origin(note, path)["assumed"]
    if schema is not None:
        if "kruify.plan" not in contents.metadata:
            raise CorruptError("its plan is missing", path, "Convert the source again")
        prefix, stripped = "", {name: name for name in contents.tensors}  # a converted file says its names itself
    else:
        prefix, stripped = strip(list(contents.tensors))
    stored = {stripped[name]: tensor for name, tensor in contents.tensors.items()}
    storage: dict[str, str] = {}
    if schema is None:
        tensors, computed, unknown = compute_weights(stored)
    else:
        computed, unknown, storage = {}, {}, read_storage(contents.metadata, stored, schema, path)
        tensors = decode(stored, storage, matrix_names(contents.metadata), path, schema)
    return Checkpoint(
        path=path,
        format=contents.format,
        tensors=Tensors(tensors),
        metadata=contents.metadata,
        size=contents.size,
        key=contents.key,
        prefix=prefix,
        names={short: name for name, short in stripped.items() if short != name},
        computed=computed,
        extras=contents.extras,
        extras_before=contents.before,
        dropped=contents.dropped,
        skipped={**contents.skipped, **unknown},
        assumed=assumed,
        ties=ties(tensors),
        module_hints=_strip_hints(contents.hints, prefix),
        globals=contents.globals,
        shards=contents.shards,
        storage=storage,
        stored=stored,
    )


def _with_second_names(path: Path, tensors: dict[str, LazyTensor], second: Mapping[str, str]) -> dict[str, LazyTensor]:
    """The tensors of a file that has tied ones once, by all their names."""
    if not all(first in tensors and name not in tensors for name, first in second.items()):
        raise CorruptError("its note of tied tensors does not fit its tensors", path, "Convert the source again")
    tied = {name: replace(tensors[name], identity=name) for name in set(second.values())}
    return {**tensors, **tied, **{name: tied[first] for name, first in second.items()}}


def _strip_hints(hints: Mapping[str, ModuleHint], prefix: str) -> dict[str, ModuleHint]:
    return {name.removeprefix(prefix) if name + "." != prefix else "": hint for name, hint in hints.items()}


def _check_total(path: Path, contents: Contents) -> None:
    for name, tensor in contents.tensors.items():
        if len(tensor.shape) > limits.DIMENSIONS or prod(max(n, 1) for n in tensor.shape) >= 1 << 62:
            sizes = str(list(tensor.shape))[:80]
            raise UnsupportedError(f"its tensor {name[:80]} has the shape {sizes}, which torch cannot hold", path)
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    if len(contents.tensors) > limits.ENTRIES or total > limits.RATIO * contents.size + limits.SLACK:
        raise UnsafeError(f"its {len(contents.tensors)} tensors ask for {total} bytes, far more than it holds", path)
    if sum(len(name) + len(text) for name, text in contents.metadata.items()) > limits.METADATA:
        raise UnsafeError(f"its metadata take more than {limits.METADATA} bytes", path)
