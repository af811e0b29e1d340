"""Read sharded checkpoints: a JSON index that says which file holds which tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kruify.checkpoint import limits
from kruify.checkpoint.file_bytes import parse_json
from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.errors import CorruptError, UnsafeError


@dataclass
class Sharded:
    """Tensors of all shards; the index's own metadata as text; the shard files."""

    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    shards: tuple[Path, ...]
    formats: set[str]


ReadShard = Callable[[Path], tuple[str, dict[str, LazyTensor]]]


def read_index(path: Path, size: int, read_shard: ReadShard) -> Sharded:
    """The tensors that an index names.

    Args: read_shard: opens one shard; gives its format and its tensors.

    Raises:
        UnsafeError: a shard outside of the index's folder, or too many.
        CorruptError: a shard is missing, or a tensor is not in the shard that the index names.
    """
    if size > limits.JSON:
        raise UnsafeError(f"its index takes {size} bytes", path)
    index = parse_json(path.read_bytes(), "its index", path)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CorruptError("it is JSON, and no index of a sharded checkpoint", path, "Give a checkpoint")
    names = sorted(set(table.values()))
    if len(names) > limits.SHARDS or len(table) > limits.ENTRIES:
        raise UnsafeError(f"its index names {len(names)} files and {len(table)} tensors", path)
    opened: dict[str, dict[str, LazyTensor]] = {}
    formats = set()
    for name in names:
        if not is_file_name(name):
            raise UnsafeError(f"its index names the file {name[:80]!r}, outside of its folder", path)
        shard = path.parent / name
        if not shard.is_file():
            raise CorruptError(f"its shard {name[:80]} is missing", path, "Put all shards beside the index")
        kind, held = read_shard(shard)
        # An identity is that within a file: shards number their storages alike.
        opened[name] = {n: replace(t, identity=derived(name, t.identity)) for n, t in held.items()}
        formats.add(kind)
    missing = next((n for n, shard in table.items() if n not in opened[shard]), None)
    if missing is not None:
        raise CorruptError(f"{missing[:80]} is not in the shard that the index names", path, "Download it again")
    metadata = index.get("metadata")
    return Sharded(
        {name: opened[shard][name] for name, shard in table.items()},
        {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {},
        tuple(path.parent / name for name in names),
        formats,
    )


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in its folder and leads nowhere else."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name) <= limits.NAME
