"""Training for weights that are stored in fewer bits: the network computes with rounded weights, and the optimiser
changes the exact ones by the gradients found there (straight-through estimator, Bengio et al. 2013; as in Jacob et al.
2018)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kruify.conversion.storing import rounded_state
from kruify.layers.storage import mark, marks

ROUNDED_FROM = 0.75
"""Share of the last phase of a run, or of a layer's own, from which on gradients are those of the weights as stored."""


@contextmanager
def rounded_weights(model: nn.Module, scales: MutableMapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, the weights of `model` have the numbers that storing them keeps; afterwards those from before again.

    Gradients found inside stay. Nothing changes where all weights are stored as float32.

    Args:
        scales: tensor -> scales of its integers of four bits, found at the first call and taken again at the others:
            where each step finds its own, all numbers of a row jump at once, and g2p at 32x ends a point worse.

    Raises:
        UnsupportedError: a number has no form in the dtype of its weight.
    """
    storage = marks(model)
    if not storage:
        yield
        return
    found = rounded_state(model, storage, scales)
    stored = [(p, found[name]) for name, p in model.named_parameters() if name in found]
    exact = [(p, p.detach().clone()) for p, _ in stored]
    try:
        with torch.no_grad():
            # In place: caches of what is made of a parameter go by its version.
            for parameter, numbers in [(p, tensor.load()) for p, tensor in stored]:
                parameter.copy_(numbers)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in exact:
                parameter.copy_(before)


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Inside, layers compute in float32 whatever their weights are stored in, as runtimes of other kinds do."""
    storage = marks(model)
    mark(model, {})
    try:
        yield
    finally:
        mark(model, storage)
