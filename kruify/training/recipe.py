"""The options of a fine-tuning run, as one value that can be stored, compared and printed."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from kruify.errors import UsageError
from kruify.training.schedule import SCHEDULES


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. The defaults are the recipe of benchmarks/recovery.

    Attributes:
        epochs: passes over the train split, end to end; fractions are allowed.
        lr: peak learning rate of AdamW. What conversion put out of place has a long way to go: 6e-3 and a teacher that
            falls silent ended better than 2e-3 (factors at 6e-3) and one that does not on all four tasks of
            benchmarks/recovery. In fewer than about five passes the latter is better.
        schedule: "onecycle", "cosine", "linear" or "constant".
        warmup: share of the run in which the learning rate rises.
        weight_decay: of dense matrices; biases, diagonals and scales are never decayed.
        factor_lr: learning rate of Kronecker factors and overlays, as a multiple of `lr`. Over T steps a change of an
            angle of W counts T times, so long memories learnt from scratch want it small.
        modrelu_lr: the same for the biases of modReLU in a KRU, which act on the state at every step, too; None for
            `factor_lr`.
        factor_weight_decay: weight decay of Kronecker factors and overlays.
        clip: gradients are scaled down to this norm; 0 for never.
        unitary_penalty: lambda of the soft unitary penalty; None for on where a plain RNN carries the state, off
            elsewhere.
        accumulate: batches added up in one optimiser step, on each process.
        ema: decay of a running average of the weights that is validated and kept in their place; 0 for none.
        patience: epochs without a better validation metric after which training stops; 0 for never.
        mixed_precision: "no" or "bf16".
        seed: of the order of batches, of dropout, of everything random.
        evaluate_first: validate before the first step, so that a run never ends worse than it began.
        distill_logits: share of the loss that compares the outputs with the teacher's; the rest compares with the
            labels.
        distill_hidden: weight of the distance to the teacher's hidden states, 0 for none. Off by default: with it (1.0)
            and outputs together, g2p-en at 16x ended no better after five epochs than without, and it costs time.
        distill_until: share of the last phase in which both of these fall to 0 along a line, so that the network can
            become better than its teacher (teacher annealing, Clark et al. 2019); None for never. With `distill_only`
            they stay.
        temperature: of the outputs that are compared.
        distill_only: no labels at all: outputs and hidden states of the teacher alone.
        heal_epochs: before all else every converted layer learns by itself to answer the teacher's inputs with the
            teacher's outputs.
        heal_lr: peak learning rate of that phase, None for `lr`.
        warm_epochs: then the Kronecker matrices are trained end to end while everything else is frozen.
        overlay_start: share of a matrix that its sparse overlay begins with, where the dense matrix is known from the
            teacher; it is pruned to its own size while training. 0 leaves overlays as they are.
        overlay_until: share of the last phase after which overlays have their size.
        overlay_pooled: the blocks of all annealed overlays compete with each other, so that gates and layers that
            need more of them get more, instead of equally many a gate.
        overlay_dropout: probability with which rows of K and rows of the overlay are dropped in training.
        save_seconds: how often the state is written to the `resume` folder, apart from every end of an epoch.
        save_steps: the same in optimiser steps; 0 for by the clock alone.
    """

    epochs: float = 5.0
    lr: float = 6e-3
    schedule: str = "onecycle"
    warmup: float = 0.2
    weight_decay: float = 0.01
    factor_lr: float = 1.0
    modrelu_lr: float | None = None
    factor_weight_decay: float = 0.0
    clip: float = 1.0
    unitary_penalty: float | None = None
    accumulate: int = 1
    ema: float = 0.0
    patience: int = 0
    mixed_precision: str = "no"
    seed: int = 0
    evaluate_first: bool = True
    distill_logits: float = 0.5
    distill_hidden: float = 0.0
    distill_until: float | None = 1.0
    temperature: float = 1.0
    distill_only: bool = False
    heal_epochs: float = 0.0
    heal_lr: float | None = None
    warm_epochs: float = 0.0
    overlay_start: float = 0.0
    overlay_until: float = 0.6
    overlay_pooled: bool = False
    overlay_dropout: float = 0.0
    save_seconds: float = 60.0
    save_steps: int = 0

    # What may differ between a run and its continuation without changing a bit of the result.
    FREE: ClassVar[tuple[str, ...]] = ("save_seconds", "save_steps")

    @classmethod
    def from_scratch(cls) -> Recipe:
        """The defaults for a network that begins at random."""
        return cls(lr=2e-3)

    def changed(self, **changes: Any) -> Recipe:
        """A copy with other values.

        Raises:
            UsageError: there is no such option, or its value makes no sense.
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]}" if close else f"There are {', '.join(names)}"
                raise UsageError(f"fine-tuning has no option '{name}'", hint=hint)
        recipe = replace(self, **changes)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raises UsageError for a value that makes no sense."""
        for name, value in self.to_json().items():
            endless = value == math.inf and name in ("epochs", "heal_epochs", "warm_epochs", "lr", "heal_lr")
            if isinstance(value, float) and (math.isnan(value) or endless):
                raise UsageError(f"{name} must be a number, got {value}", "fine-tuning")
        for name, wrong, expected in (
            ("epochs", self.epochs < 0, "0 or more"),
            ("lr", self.lr <= 0, "above 0"),
            ("schedule", self.schedule not in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", not 0 <= self.warmup <= 1, "between 0 and 1"),
            ("weight_decay", self.weight_decay < 0, "0 or more"),
            ("factor_lr", self.factor_lr < 0, "0 or more"),
            ("modrelu_lr", self.modrelu_lr is not None and self.modrelu_lr < 0, "0 or more"),
            ("factor_weight_decay", self.factor_weight_decay < 0, "0 or more"),
            ("clip", self.clip < 0, "0 or more"),
            ("unitary_penalty", self.unitary_penalty is not None and self.unitary_penalty < 0, "0 or more"),
            ("accumulate", self.accumulate < 1, "1 or more"),
            ("ema", not 0 <= self.ema < 1, "from 0 to below 1"),
            ("distill_logits", not 0 <= self.distill_logits <= 1, "between 0 and 1"),
            ("distill_hidden", self.distill_hidden < 0, "0 or more"),
            ("distill_until", self.distill_until is not None and not 0 < self.distill_until <= 1, "above 0, at most 1"),
            ("temperature", self.temperature <= 0, "above 0"),
            ("heal_epochs", self.heal_epochs < 0, "0 or more"),
            ("heal_lr", self.heal_lr is not None and self.heal_lr <= 0, "above 0"),
            ("warm_epochs", self.warm_epochs < 0, "0 or more"),
            ("overlay_start", not 0 <= self.overlay_start <= 1, "between 0 and 1"),
            ("overlay_until", not 0 <= self.overlay_until <= 1, "between 0 and 1"),
            ("overlay_dropout", not 0 <= self.overlay_dropout < 1, "from 0 to below 1"),
            ("patience", self.patience < 0, "0 or more"),
            ("mixed_precision", self.mixed_precision not in ("no", "bf16"), "no or bf16"),
        ):
            if wrong:
                raise UsageError(f"{name} must be {expected}, got {getattr(self, name)}", "fine-tuning")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
