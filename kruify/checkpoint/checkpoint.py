"""What `read` gives back: the tensors of a file and everything that is needed to write the file again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kruify.checkpoint.file_bytes import chunks
from kruify.checkpoint.file_format import ORIGIN, parse_origin
from kruify.checkpoint.modules import ModuleHint
from kruify.checkpoint.parametrised import Computed
from kruify.checkpoint.tensors import LazyTensor, Tensors, ties


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the file, as it was named.
        format: "torch", "torch-legacy", "torch-module", "torchscript", "safetensors", "safetensors-sharded",
            "torch-sharded", "npz", "onnx" or "keras"; a file that kruify wrote has `is_kruify`, too.
        tensors: name -> tensor, loaded on access, without wrapper prefixes, parametrised weights computed, torch's gate
            order and layout.
        metadata: the strings that the file carries beside its tensors.
        storage: weights that the file holds in fewer bits than `tensors` has them in (checkpoint.stored) -> dtype.
        stored: the tensors as they stand in the file, by the names of `tensors` where they have one there.
        size: bytes of the file, with its shards.
        key: the nested entry that held the state dict ("state_dict", "a.b"), None if the file is the state dict itself.
        prefix: what was stripped from the front of every name ("module._orig_mod."), "" if nothing.
        names: stripped name -> name in the file, for every name that differs.
        computed: name -> how the weight was computed from what the file holds (weight norm, spectral norm, pruning,
            weight drop).
        extras: the plain values found beside the state dict ("epoch": 3), written back with it; `extras_before` of
            them stand before the state dict.
        dropped: one sentence for each thing in the file that kruify does not carry on (optimizer state).
        skipped: recurrent layers that were recognised and cannot be read: name -> reason (a GRU that resets before the
            matmul).
        assumed: layer -> what was taken for granted of it (Keras: no configuration, or settings that torch leaves to
            the caller).
        ties: second name -> first name of one and the same tensor.
        module_hints: recurrent module -> its class and what a state dict does not say (batch_first, dropout,
            nonlinearity); from whole modules, TorchScript, ONNX and Keras.
        globals: the classes and functions that the file's pickle names; none was looked up.
        shards: the files beside `path` that hold the tensors, in order.
    """

    path: Path
    format: str
    tensors: Tensors
    metadata: dict[str, str]
    size: int
    key: str | None = None
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    extras_before: int = 0
    dropped: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    module_hints: Mapping[str, ModuleHint] = field(default_factory=dict)
    globals: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    storage: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, LazyTensor] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        return (self.path, *self.shards)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors as the file holds them, with indices and scales; tied ones once."""
        held = self.stored if self.is_kruify else self.tensors.lazy
        second = ties(held)
        return sum(tensor.nbytes for name, tensor in held.items() if name not in second)

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file's bytes, followed by those of its shards."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                for chunk in chunks(file):
                    digest.update(chunk)
        return digest.hexdigest()

    @property
    def is_kruify(self) -> bool:
        """Whether kruify wrote this file."""
        return "kruify.schema" in self.metadata

    @property
    def is_graph(self) -> bool:
        """Whether its tensors are those of an ONNX graph: any of its constants, not parameters of a module alone."""
        note = self.metadata.get(ORIGIN)
        return "onnx" in (self.format, parse_origin(note, self.path)["format"] if note else "")

    @property
    def notes(self) -> list[str]:
        """Sentences on what is left out and what is assumed, to be shown before the work."""
        assumed = (f"assumed of {name}: {text}" for name, text in self.assumed.items())
        return [*self.dropped, *assumed]

    def nonfinite(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Tensors with NaN or infinity -> how many; reads one tensor at a time.

        Args: names: the tensors to look at, all by default.
        """
        found: dict[str, int] = {}
        for name in self.tensors if names is None else names:
            if self.tensors.lazy[name].reals:
                tensor = self.tensors[name]
                tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
                if count := int((~tensor.isfinite()).sum()):
                    found[name] = count
        return found
