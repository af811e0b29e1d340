"""The options of a fine-tuning run, as one value that can be stored, compared and printed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kruify.errors import UsageError
from kruify.training.schedule import SCHEDULES


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. The defaults are the recipe of benchmarks/recovery.

    Attributes:
        epochs: passes over the train split, end to end; fractions are allowed.
        lr: peak learning rate of AdamW. A converted network has a long way to go: 6e-3 with an annealed teacher ended
            better than 2e-3 (factors at 6e-3) with a constant one on all four tasks of benchmarks/recovery. In fewer
            than about five epochs the latter is better. `compress` and `sweep` try a third of it, too.
        schedule: "onecycle", "cosine", "linear" or "constant".
        warmup: share of the run in which the learning rate rises.
        weight_decay: of dense matrices; factors, sparse residuals, biases, diagonals and scales are never decayed.
        factor_lr: learning rate of Kronecker factors and sparse residuals, as a multiple of `lr`. Over T steps a change
            of an angle of W counts T times, so long memories learnt from scratch need a small one.
        modrelu_lr: the same for the biases of modReLU in a KRU, which act on the state at every step, too; None for
            `factor_lr`.
        clip: gradients are scaled down to this norm; 0 for never.
        unitary_penalty: lambda of the soft unitary penalty; None for on where a plain RNN carries the state, off
            elsewhere.
        accumulate: batches per optimiser step on each process.
        patience: epochs without a better validation metric after which training stops; 0 for never.
        mixed_precision: "no" or "bf16".
        seed: of the order of batches, of dropout, of everything random.
        distill_logits: weight a of the teacher in the loss (1 - a) * task loss + a * distance from the teacher's
            outputs; 1 with `distill_until=None` uses no labels.
        distill_until: share of the run after which a has been annealed linearly to zero, so that the network can
            become better than its teacher (teacher annealing, Clark et al. 2019); None keeps it constant. A teacher
            that the network has overtaken on "valid" is left, unless a is 1.
        sparse_start: share of a matrix that its sparse residual begins with, taken from the teacher's dense matrix;
            gradual pruning brings it to its own size while training. 0 leaves sparse residuals as they are.
        heal_epochs: epochs of layer-wise training before all else: every converted layer by itself learns to map the
            teacher's inputs to the teacher's outputs.
        heal_lr: peak learning rate of layer-wise training; None for `lr`.
    """

    epochs: float = 5.0
    lr: float = 6e-3
    schedule: str = "onecycle"
    warmup: float = 0.2
    weight_decay: float = 0.01
    factor_lr: float = 1.0
    modrelu_lr: float | None = None
    clip: float = 1.0
    unitary_penalty: float | None = None
    accumulate: int = 1
    patience: int = 0
    mixed_precision: str = "no"
    seed: int = 0
    distill_logits: float = 0.5
    distill_until: float | None = 1.0
    sparse_start: float = 0.0
    heal_epochs: float = 0.0
    heal_lr: float | None = None

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
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} must be a number, got {value}", "fine-tuning")
            if value is not None and not holds(value):
                raise UsageError(f"{name} must be {expected}, got {value}", "fine-tuning")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_Rule = tuple[Callable[[Any], bool], str]
MOST = 1_000_000
"""The largest value that makes sense anywhere: a run of more epochs never ends, a larger rate overflows."""
_NOT_NEGATIVE: _Rule = (lambda v: 0 <= v <= MOST, f"0 or more, at most {MOST}")
_POSITIVE: _Rule = (lambda v: 0 < v <= MOST, f"above 0, at most {MOST}")
_SHARE: _Rule = (lambda v: 0 <= v <= 1, "between 0 and 1")
_RULES: dict[str, _Rule] = {
    "epochs": _NOT_NEGATIVE,
    "lr": _POSITIVE,
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": _SHARE,
    "weight_decay": _NOT_NEGATIVE,
    "factor_lr": _NOT_NEGATIVE,
    "modrelu_lr": _NOT_NEGATIVE,
    "clip": _NOT_NEGATIVE,
    "unitary_penalty": _NOT_NEGATIVE,
    "accumulate": (lambda v: 1 <= v <= MOST, f"from 1 to {MOST}"),
    "patience": _NOT_NEGATIVE,
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 4294967295"),
    "mixed_precision": (lambda v: v in ("no", "bf16"), "no or bf16"),
    "distill_logits": _SHARE,
    "distill_until": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "sparse_start": _SHARE,
    "heal_epochs": _NOT_NEGATIVE,
    "heal_lr": _POSITIVE,
}
