"""Write a file of the kind that was read, with its names and its wrapper: a drop-in for the code that made it.

`origin(checkpoint)` is a short JSON text about the file that was read; a converted file carries it in its metadata, so
that the original kind can be written when the original file is gone. Kinds that are more than tensors (whole modules,
TorchScript, ONNX, Keras) need the original file as well; see `in_place.py`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kruify.checkpoint import in_place
from kruify.checkpoint.checkpoint import Checkpoint
from kruify.checkpoint.extras import to_json
from kruify.checkpoint.file_bytes import to_text
from kruify.checkpoint.file_format import NETWORK, ORIGIN, parse_origin
from kruify.checkpoint.onnx_in_place import replace_in_onnx
from kruify.checkpoint.parametrised import Computed, sources_for
from kruify.checkpoint.reading import read, read_contents
from kruify.checkpoint.sharded import is_file_name
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import as_bytes, as_lazy, atomic_file, write_safetensors, write_torch
from kruify.errors import CorruptError, UnsupportedError, UsageError

NEEDS_SOURCE = ("torch-module", "torchscript", "onnx", "keras")
"""Formats that are written into a copy of the original file."""


def origin(checkpoint: Checkpoint) -> str:
    """What is needed to write the original kind of file again, as JSON; same checkpoint, same text."""
    (shards, metadata), seen = _shards(checkpoint), dict[int, int]()
    table: dict[str, Any] = {
        "format": checkpoint.format,
        "key": checkpoint.key,
        "names": dict(checkpoint.names),
        "order": [name for weight in checkpoint.tensors for name in _stored_names(checkpoint, weight)],
        "computed": {name: [how.how, list(how.sources), how.dim] for name, how in checkpoint.computed.items()},
        "ties": dict(checkpoint.ties),
        "extras": {name: to_json(value, seen) for name, value in checkpoint.extras.items()},
        "extras_before": checkpoint.extras_before,
        "metadata": metadata,
        "shards": shards,
        "assumed": dict(checkpoint.assumed),
    }
    return to_text({name: value for name, value in table.items() if value})


def carried(source: Checkpoint) -> dict[str, str]:
    """Metadata of a dense file that every file made from it carries on: how to write its kind again, and which of its
    task's networks it holds."""
    return {ORIGIN: origin(source), **{name: source.metadata[name] for name in (NETWORK,) if name in source.metadata}}


def write_original(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    origin: str,
    *,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write tensors as a file of the original kind, then open it again and compare.

    Args:
        path: the file to write; for a sharded checkpoint its index, in a folder that does not hold the shards yet.
        tensors: by the names that `read` gave, dense, of the original shapes and dtypes.
        origin: from `origin(checkpoint)`, or metadata["kruify.origin"] of a converted file.
        source: the original file; needed for `NEEDS_SOURCE` formats only.

    Raises:
        UsageError: the original file is needed, or is another one; the file cannot be written.
        UnsupportedError: an origin of a kind that this version does not know.
        CorruptError: `origin` is damaged, or the written file does not hold what was asked for.
    """
    path = Path(path)
    table = parse_origin(origin, path)
    lazy = as_lazy(tensors)
    computed = table["computed"]
    stored = _in_order(_sources(lazy, computed), table["order"])
    named = {table["names"].get(name, name): tensor for name, tensor in stored.items()}
    kind, key = table["format"], table["key"]
    tied = {a: b for a, b in table["ties"].items() if a in lazy and b in lazy and _equal(lazy[a], lazy[b])}
    if kind in ("torch", "torch-legacy"):
        links = _in_file(tied, table)
        before, legacy = table["extras_before"], kind == "torch-legacy"
        write_torch(
            path, named, table["metadata"], key=key, extras=table["extras"], before=before, links=links, legacy=legacy
        )
    elif kind == "safetensors":
        write_safetensors(path, named, table["metadata"])
    elif kind == "npz":
        _write_npz(path, named)
    elif kind in ("safetensors-sharded", "torch-sharded"):
        _write_shards(path, named, table, _in_file(tied, table))
    elif kind in NEEDS_SOURCE:
        if source is None:
            raise UsageError(
                f"the original was {_WORDS[kind]}, which is more than its weights", path, "Give the original file, too"
            )
        apart = {a: b for a, b in table["ties"].items() if a in lazy and a not in tied}
        if apart and kind != "onnx":
            a, b = min(apart.items())
            what = f"{a} and {b} are one tensor in {_WORDS[kind]}, and differ now"
            raise UnsupportedError(what, path, "Convert both alike, or write a state dict: kruify.densify")
        _write_into_copy(Path(source), path, named, kind, key)
    else:
        raise UnsupportedError(f"it came from a {str(kind)[:40]} file, which this kruify cannot write", path)
    _compare(path, kind, key, lazy, computed)


_WORDS = {
    "torch-module": "a whole pickled module",
    "torchscript": "a TorchScript archive",
    "onnx": "an ONNX model",
    "keras": "a Keras model",
}


def _stored_names(checkpoint: Checkpoint, weight: str) -> tuple[str, ...]:
    how = checkpoint.computed.get(weight)
    return how.sources if how else (weight,)


def _shards(checkpoint: Checkpoint) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Shard file name -> names in the file; the metadata, those of an index as they stand in it."""
    if not checkpoint.format.endswith("-sharded"):
        return {}, {} if checkpoint.is_kruify else checkpoint.metadata
    index = json.loads(checkpoint.path.read_bytes().decode("utf-8"))
    table: dict[str, list[str]] = {}
    for name, shard in index["weight_map"].items():
        table.setdefault(shard, []).append(name)
    return table, index.get("metadata", {})


def _sources(lazy: Mapping[str, LazyTensor], computed: Mapping[str, Computed]) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for name, tensor in lazy.items():
        if name in computed:
            found |= {n: LazyTensor.of(t) for n, t in sources_for(tensor.load(), computed[name]).items()}
        else:
            found[name] = tensor
    return found


def _in_order(tensors: dict[str, LazyTensor], order: list[str]) -> dict[str, LazyTensor]:
    first = {name: tensors[name] for name in order if name in tensors}
    return {**first, **tensors}


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and as_bytes(a.load()).equal(as_bytes(b.load()))


def _write_npz(path: Path, named: Mapping[str, LazyTensor]) -> None:
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in named.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, tensor.load().numpy(), allow_pickle=False)


def _in_file(tied: Mapping[str, str], table: Mapping[str, Any]) -> dict[str, str]:
    """Second names and first names as the file has them."""
    return {table["names"].get(a, a): table["names"].get(b, b) for a, b in tied.items()}


def _write_shards(
    path: Path, named: Mapping[str, LazyTensor], table: Mapping[str, Any], links: Mapping[str, str]
) -> None:
    for shard in table["shards"]:
        if not is_file_name(shard) or (path.parent / shard).exists():
            raise UsageError(
                f"its shard {shard[:80]!r} is there already, or no file name", path, "Write to another folder"
            )
    index: dict[str, str] = {}
    for shard, names in table["shards"].items():
        content = {name: named[name] for name in names if name in named}
        index |= dict.fromkeys(content, shard)
        if table["format"] == "safetensors-sharded":
            write_safetensors(path.parent / shard, content, {"format": "pt"})
        else:
            write_torch(path.parent / shard, content, links=links)
    if missing := [name for name in named if name not in index]:
        raise CorruptError(f"no shard of the original held {missing[0][:80]}", path)
    whole = {"metadata": table["metadata"], "weight_map": {name: index[name] for name in named}}
    with atomic_file(path) as file:
        file.write(json.dumps(whole, indent=2).encode())


def _write_into_copy(source: Path, path: Path, named: Mapping[str, LazyTensor], kind: str, key: str | None) -> None:
    if kind == "onnx":
        replace_in_onnx(source, path, named)
    elif kind == "keras":
        in_place.replace_in_keras(source, path, named)
    else:
        in_place.replace_in_torch(source, read_contents(source, key).tensors, path, named)


def _other_bias(name: str) -> str:
    pairs = {"bias_ih": "bias_hh", "bias_hh": "bias_ih"}
    return next((name.replace(a, b) for a, b in pairs.items() if f".{a}_l" in name), "")


def _compare(
    path: Path, kind: str, key: str | None, lazy: Mapping[str, LazyTensor], computed: Mapping[str, Computed]
) -> None:
    """Open what was written and compare every tensor; computed ones to rounding."""
    written = read(path, key).tensors
    for name, tensor in lazy.items():
        if name not in written:
            raise CorruptError(f"{name} is missing from what was written", path, "Report this as a bug")
        wanted, found = tensor.load(), written[name]
        if (
            kind == "keras" and (other := _other_bias(name)) in lazy
        ):  # most Keras cells have one bias where torch has two
            wanted, found = wanted + lazy[other].load(), found + written[other]
        close = name in computed or kind == "keras"
        if close and wanted.is_floating_point():
            scale = float(wanted.double().abs().max()) if wanted.numel() else 0.0
            slack = 16 * float(np.finfo(np.float32).eps if wanted.itemsize >= 4 else 2.0**-7) * scale
            same = bool(((wanted.double() - found.double()).abs() <= slack).all())
        else:
            same = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            same = same and as_bytes(found).equal(as_bytes(wanted))
        if not same and not (close and bool(wanted.isnan().any())):
            raise CorruptError(f"{name} was not written as it should be", path, "Report this as a bug")
