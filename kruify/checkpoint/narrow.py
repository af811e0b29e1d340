"""Tensors in 16-bit floats, and in float32 again."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.errors import UnsupportedError


def narrow(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A real tensor, called `name` in errors, as `dtype` of 16 bits.

    Raises:
        UnsupportedError: on loading, a finite number is beyond `dtype`.
    """

    def load() -> Tensor:
        found = tensor.load().detach()
        low = found.to(dtype)
        if bool((found.isfinite() & ~low.isfinite()).any()):
            raise UnsupportedError(f"it has numbers beyond {dtype}", name, "Take --dtype bfloat16, or --keep it")
        return low

    return LazyTensor(tensor.shape, dtype, load, derived(dtype, tensor.identity))


def widened(tensor: LazyTensor) -> LazyTensor:
    """The tensor in float32."""
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.load().float(), derived("float32", tensor.identity))
