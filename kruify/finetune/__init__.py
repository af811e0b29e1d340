"""Fine-tuning: the training loop, the unitary penalty, distillation.

`accelerate` is imported by `finetune()` alone, so that everything else works without it.
"""

from __future__ import annotations

from kruify.finetune.finetune import finetune
from kruify.finetune.penalty import default_penalty, unitary_penalty
from kruify.finetune.recipe import Recipe
from kruify.finetune.result import FinetuneResult, Progress

__all__ = [
    "FinetuneResult",
    "Progress",
    "Recipe",
    "default_penalty",
    "finetune",
    "unitary_penalty",
]
