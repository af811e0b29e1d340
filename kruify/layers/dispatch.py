"""Which path runs a layer: the measured rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kruify.layers.base import KRUBase


def pick(layer: KRUBase, steps: int, batch: int, x: Tensor) -> str:
    """The fastest of "reference" and "dense" for these sizes.

    Forming W costs about one pass over it; a loop in Python costs a fixed time a step. One step alone (streaming) is
    faster with the factors; from the second step on torch's own kernel wins.
    """
    if steps == 1 and batch <= 8 and layer.hidden_size >= 512:
        return "reference"
    return "dense"
