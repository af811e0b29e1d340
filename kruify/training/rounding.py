"""Training for weights that are stored in fewer bits: the network computes with rounded weights, and the optimiser
changes the exact ones by the gradients found there (straight-through estimator, Bengio et al. 2013; as in Jacob et al.
2018)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kruify.conversion import densify
from kruify.conversion.beside import linear_layers
from kruify.conversion.calibration import bias_correction, calibrate
from kruify.conversion.four_bits import round_matrix, round_weight
from kruify.conversion.storing import rounded_state
from kruify.errors import KruifyError
from kruify.layers import KroneckerMatrix
from kruify.layers.storage import mark, marks
from kruify.tasks.base import Task

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


@dataclass(frozen=True)
class _Inputs:
    """Batches of a task that are there already."""

    task: Task
    kept: Sequence[Any]

    def batches(self, split: str, *, seed: int = 0) -> Sequence[Any]:
        return self.kept

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.forward(model, batch)


def round_to_four_bits(model: nn.Module, task: Task, batches: Sequence[Any]) -> None:
    """Rounds the weights of four bits in place for what they are applied to on these batches (conversion.four_bits):
    training with rounded weights begins nearer to the exact ones, g2p at 32x ends 1.2 points better.

    Where the network does not tell what its matrices are applied to, nothing is done.
    """
    four_bits = {name for name, dtype in marks(model).items() if dtype == "int4"}
    moments = {}
    with suppress(KruifyError):
        dense = densify(model)
        moments = calibrate(dense, _Inputs(task, batches), beside=linear_layers(dense))
    done = set[int]()  # what several layers share is rounded once
    for name in sorted(four_bits & moments.keys()):
        layer, _, own = name.rpartition(".")
        module = model.get_submodule(layer)
        weight, bias = getattr(module, own), getattr(module, own.replace("weight", "bias"), None)
        if id(weight) in done or not isinstance(weight, KroneckerMatrix | nn.Parameter):
            continue
        done.add(id(weight))
        second = moments[name].weight(bias is not None)
        with torch.no_grad():
            if isinstance(weight, KroneckerMatrix):
                before = weight.to_dense()
                round_matrix(weight, before, second)
                after = weight.to_dense()
            else:
                before, after = weight.detach().clone(), round_weight(weight, second)
                weight.copy_(after)
            if isinstance(bias, nn.Parameter):
                bias.copy_(bias.cpu().double() + bias_correction(before, after, moments[name].mean))


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Inside, layers compute in float32 whatever their weights are stored in, as runtimes of other kinds do."""
    storage = marks(model)
    mark(model, {})
    try:
        yield
    finally:
        mark(model, storage)
