"""Which path runs a layer: the measured rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kruify.layers import kernel

if TYPE_CHECKING:
    from kruify.layers.base import KRUBase


def pick(layer: KRUBase, steps: int, batch: int, x: Tensor) -> str:
    """The fastest of "kernel", "dense" and "reference" for these sizes.

    Forming W costs about one pass over it; a loop in Python costs a fixed time a step. One step alone (streaming) is
    faster with the factors; from the second step on torch's own kernel wins over the loop.
    """
    if kernel_serves(layer, x):
        return "kernel"
    if steps == 1 and batch <= 8 and layer.hidden_size >= 512:
        return "reference"
    return "dense"


def kernel_serves(layer: KRUBase, x: Tensor) -> bool:
    """Whether the compiled kernels can run every layer and direction."""
    matrices = (layer.weights(k, d)["weight_hh"] for k, d in layer.directions())
    return all(kernel.serves(matrix, x, bool(layer.proj_size)) for matrix in matrices)
