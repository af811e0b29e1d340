"""What `read` gives back: the tensors of a file and everything that is needed to write the file again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kruify.checkpoint.tensors import Tensors

CHUNK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the file, as it was named.
        format: "torch", "safetensors", ... ; a file that kruify wrote has `is_kruify`.
        tensors: name -> tensor, loaded on access, names without wrapper prefixes.
        metadata: the strings that the file carries beside its tensors.
        size: bytes of the file.
        key: the nested entry that held the state dict ("state_dict", "a.b"), None if the file is the state dict itself.
        prefix: what was stripped from the front of every name ("module._orig_mod."), "" if nothing.
        names: stripped name -> name in the file, for every name that differs.
        extras: the plain values found beside the state dict ("epoch": 3), written back with it.
        dropped: one sentence for each thing in the file that kruify does not carry on (optimizer state).
        ties: second name -> first name of one and the same tensor.
    """

    path: Path
    format: str
    tensors: Tensors
    metadata: dict[str, str]
    size: int
    key: str | None = None
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file's bytes."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def is_kruify(self) -> bool:
        """Whether kruify wrote this file."""
        return "kruify.schema" in self.metadata
