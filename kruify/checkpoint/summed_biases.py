"""Two bias vectors of a recurrent layer that are only added, stored as their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kruify.checkpoint.file_format import AGAIN
from kruify.checkpoint.narrow import narrow
from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.errors import CorruptError
from kruify.quantization import DTYPES

SUM, SUM_BUT_N = "sum", "sum+n"
SUMS = (SUM, SUM_BUT_N)
"""What `storage` says of a b_hh that stands in b_ih: the file holds b_ih + b_hh in place of b_ih, and nothing more; of
a GRU, whose b_hn is inside of r * (...), that of r and z, b_in, and b_hn alone in place of b_hh. A model gets zeros for
what is in the sum."""


def first_bias(second: str) -> str:
    """The full name of the b_ih beside a b_hh; another name as it is."""
    return renamed(second, "bias_hh", "bias_ih")


def renamed(full: str, before: str, after: str) -> str:
    """A full name with `after` where the tensor's own name begins with `before`; another name as it is."""
    owner, dot, name = full.rpartition(".")
    return owner + dot + after + name.removeprefix(before) if name.startswith(before) else full


def in_full(storage: Mapping[str, str]) -> dict[str, str]:
    """The same for a form that has both biases: a b_hh as its b_ih."""
    return {name: storage[first_bias(name)] if dtype in SUMS else dtype for name, dtype in storage.items()}


def summed(storage: Mapping[str, str]) -> dict[str, str]:
    """Full name of every b_ih that is a sum -> that of the b_hh in it."""
    return {first_bias(name): name for name, dtype in storage.items() if dtype in SUMS}


def _inside(how: str, size: int) -> int:
    """How many entries of a b_hh of this size are in the sum."""
    return size if how == SUM else size * 2 // 3


def sum_of(
    first: str, second: str, tensors: Mapping[str, LazyTensor], storage: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """The vectors of two biases as a file holds them: the sum, and what of b_hh is not in it, by their names.

    Args:
        first, second: full names of b_ih and b_hh, both (gates * hidden,).
        storage: dtype of the first, which of `SUMS` the second is.

    Raises:
        UnsupportedError: on loading, a number is beyond the dtype.
    """
    b_ih, b_hh, dtype = tensors[first], tensors[second], DTYPES[storage[first]]
    inside = _inside(storage[second], size := b_hh.numel)

    def total() -> Tensor:
        found = b_ih.load().detach().clone()
        found[:inside] += b_hh.load().detach()[:inside]
        return found

    both = derived("sum", inside, b_ih.identity, b_hh.identity)
    low = narrow(first, LazyTensor(b_ih.shape, b_ih.dtype, total, both), dtype)
    stored = {first: replace(low, load=lambda: low.load() + 0)}  # a sum with zeros, read again, has no -0 either
    if inside < size:
        identity = derived("rest", inside, b_hh.identity)
        rest = LazyTensor((size - inside,), b_hh.dtype, lambda: b_hh.load()[inside:], identity)
        stored[second] = narrow(second, rest, dtype)
    return stored


def second_from_sum(first: LazyTensor, rest: LazyTensor | None, how: str, where: str) -> LazyTensor:
    """b_hh, float32 of the shape of b_ih, from the sum that it is in, and what of it stands beside: nothing, or b_hn.

    Raises:
        CorruptError: what stands beside does not fit the sum.
    """
    inside = _inside(how, size := first.numel)
    beside = None if rest is None else (rest.shape, rest.dtype)
    if len(first.shape) != 1 or beside != (None if how == SUM else ((size - inside,), first.dtype)):
        raise CorruptError("it does not fit the bias that it is added to", where, AGAIN)

    def load() -> Tensor:
        found = torch.zeros_like(first.load(), dtype=torch.float32)
        if rest:
            found[inside:] = rest.load()
        return found

    identity = derived("second", how, first.identity, *([rest.identity] if rest else []))
    return LazyTensor(first.shape, torch.float32, load, identity)
