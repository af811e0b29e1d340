"""A running average of the weights (Polyak & Juditsky 1992), validated and kept in the weights' place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the trained parameters of `model`.

    Early on the decay is (1 + t) / (10 + t), so that the first weights are forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [current[n].detach() for n in self.shadow], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The average stands in the model inside the block, the weights themselves after it."""
        current = {n: p for n, p in model.named_parameters() if n in self.shadow}
        saved = {n: p.detach().clone() for n, p in current.items()}
        try:
            for name, parameter in current.items():
                parameter.copy_(self.shadow[name])
            yield
        finally:
            for name, parameter in current.items():
                parameter.copy_(saved[name])
