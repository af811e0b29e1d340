"""Fine-tuning: the training loop, the unitary penalty, distillation; layer-wise training without labels.

`accelerate` is imported by `finetune()` alone, so that everything else works without it.
"""

from __future__ import annotations

from kruify.training.finetuning import finetune
from kruify.training.layerwise import Healing, heal
from kruify.training.penalty import default_penalty, unitary_penalty
from kruify.training.recipe import Recipe
from kruify.training.result import FinetuneResult, Validation

__all__ = [
    "FinetuneResult",
    "Healing",
    "Recipe",
    "Validation",
    "default_penalty",
    "finetune",
    "heal",
    "unitary_penalty",
]
