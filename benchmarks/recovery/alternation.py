"""Learning-compression: the dense network is trained with a pull towards its own nearest sum of products, which grows
until it is nearly one; then it is converted and trained on.

Carreira-Perpinan & Idelbayev, "'Learning-compression' algorithms for neural net pruning" (CVPR 2018), with the
quadratic penalty. The compression step is kruify's decomposition. It lives here and not in the package until it wins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kruify.api import convert
from kruify.finetune import finetune
from kruify.finetune.feed import count_batches
from kruify.finetune.result import OnProgress
from kruify.layers.matrix import KroneckerMatrix
from kruify.plan import Plan
from kruify.task import Task


class Pulled(Task):
    """`task` with mu/2 ||W - P||^2 added to the loss in training, P the nearest matrix of the plan's structure.

    Args:
        model: dense; its weights are read at every compression step.
        steps: optimiser steps of the run; mu grows from `weights[0]` to `weights[1]` over them, by equal factors.
        every: steps between two compression steps.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        plan: Plan,
        steps: int,
        every: int = 100,
        weights: tuple[float, float] = (1e-4, 0.1),
    ) -> None:
        self.task, self.model_, self.plan = task, model, plan
        self.steps, self.every, self.weights = steps, every, weights
        self.metric, self.higher_is_better = "distance", False  # the last weights are kept, not the least pulled
        self.output_kind = task.output_kind
        self.step = 0
        self.nearest: dict[str, Tensor] = {}

    def model(self) -> nn.Module:
        return self.task.model()

    def batches(self, split: str, *, seed: int = 0) -> Iterable[Any]:
        return self.task.batches(split, seed=seed)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.forward(model, batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = self.task.loss(outputs, batch)
        if not self.model_.training:
            return loss
        if self.step % self.every == 0:
            self.compress()
        start, end = self.weights
        mu = start * (end / start) ** min(1.0, self.step / self.steps)
        self.step += 1
        weights = dict(self.model_.named_parameters())
        return loss + mu / 2 * sum((weights[n] - p).square().sum() for n, p in self.nearest.items())

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return {**self.task.evaluate(model, split), "distance": self.distance()}

    def weight(self, batch: Any) -> float:
        return self.task.weight(batch)

    @torch.no_grad()
    def compress(self) -> None:
        small = convert(self.model_, plan=self.plan)[0]
        self.nearest = {n: m.to_dense() for n, m in small.named_modules() if isinstance(m, KroneckerMatrix)}

    def distance(self) -> float:
        """||W - P|| / ||W|| over all matrices."""
        self.compress()
        weights = dict(self.model_.named_parameters())
        lost = sum(float((weights[n] - p).square().sum()) for n, p in self.nearest.items())
        return (lost / sum(float(weights[n].square().sum()) for n in self.nearest)) ** 0.5


def alternate(
    dense: nn.Module, task: Task, plan: Plan, options: dict[str, Any], on_progress: OnProgress | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Half of a run's epochs on the dense network under the pull; the network, and what became of it."""
    model = copy.deepcopy(dense)
    options = {**options, "epochs": options["epochs"] / 2, "schedule": "constant"}
    steps = round(options["epochs"] * count_batches(task, options["seed"]))
    pulled = Pulled(task, model, plan, steps)
    result = finetune(model, pulled, device="cpu", evaluate_first=False, on_progress=on_progress, **options)
    pulled.model_ = model
    return model, {"history": result.history, "distance": pulled.distance()}
