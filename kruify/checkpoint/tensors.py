"""Tensors of a file that are loaded one at a time, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


def derived(*identities: Hashable) -> Hashable:
    """The identity of what is made of tensors with these: None, for no ties, where one of them has none."""
    return None if None in identities else identities


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose numbers are read by `load()`.

    identity: equal for two names of one and the same tensor: (storage, dtype, offset, shape, stride). None where the
        file cannot share storage. Equal storage alone is no tie: CUDA LSTMs keep all their weights in one.
    place: where the file keeps the numbers, in a form that its reader knows; for writing them in place.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    identity: Hashable = None
    place: Any = None

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """Wrap a tensor that is already in memory."""
        tensor = tensor.detach()
        identity = (
            tensor.untyped_storage().data_ptr(),
            tensor.dtype,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        # A storage without bytes has no address: empty tensors are never ties.
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, identity if tensor.numel() else None)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def reals(self) -> int:
        """Real numbers in it: a complex one counts twice, whole numbers are none."""
        return self.numel * (2 if self.dtype.is_complex else 1 if self.dtype.is_floating_point else 0)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """A read-only mapping name -> tensor that loads on access and keeps nothing.

    `lazy` holds the same names with shapes and dtypes but without the numbers. `{**checkpoint.tensors.lazy, "w": new}`
    is what the writers take to copy a large file one tensor at a time.
    """

    def __init__(self, lazy: Mapping[str, LazyTensor]) -> None:
        self.lazy = dict(lazy)

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.lazy

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} tensors, {sum(t.nbytes for t in self.lazy.values())} bytes)"


def ties(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Names that are second names of an earlier tensor: later name -> first name."""
    first: dict[Hashable, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.identity is None:
            continue
        if tensor.identity in first:
            found[name] = first[tensor.identity]
        else:
            first[tensor.identity] = name
    return found
