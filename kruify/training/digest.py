"""What tells the data and the weights of one run from those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from kruify.checkpoint import tensor_bytes


class Digest:
    """sha256 of values that are added one by one: tensors, arrays, and lists, tuples and dicts of them."""

    def __init__(self) -> None:
        self._found = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Of what is none of these only the type counts, but for texts and numbers."""
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.hasobject:
                self.add(value.tolist())
            else:
                self._found.update(f"{value.dtype} {value.shape} ".encode())
                self._found.update(value.tobytes())
        elif isinstance(value, Tensor):
            self._found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            self._found.update(tensor_bytes(value))
        elif isinstance(value, Mapping):
            self.add([part for name in sorted(value, key=str) for part in (str(name), value[name])])
        elif isinstance(value, list | tuple):
            self._found.update(f"{len(value)} of ".encode())
            for part in value:
                self.add(part)
        else:
            plain = isinstance(value, str | bytes | int | float | None)
            self._found.update(f"{value!r} ".encode() if plain else f"{type(value).__name__} ".encode())

    def hex(self) -> str:
        return self._found.hexdigest()


def fingerprint(*states: Mapping[str, Any]) -> str:
    """Of state dicts: what tells networks from others of equal shapes."""
    digest = Digest()
    for state in states:
        digest.add(state)
    return digest.hex()
