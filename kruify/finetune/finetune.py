"""`finetune`: the way in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.finetune.processes import Processes
from kruify.finetune.recipe import Recipe
from kruify.finetune.result import FinetuneResult, OnProgress
from kruify.finetune.trainer import Phase, Trainer
from kruify.task import Task


def finetune(
    model: nn.Module,
    task: Task,
    *,
    recipe: Recipe | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
    on_best: Callable[[nn.Module, dict[str, float]], None] | None = None,
    **changes: Any,
) -> FinetuneResult:
    """Train `model` on `task`, keep the weights that validate best.

    The model is changed in place, and moved to the device. The same code runs in one process and under `torchrun`: N
    processes give what one process gives that adds up N batches a step (`accumulate=N`), and, where the task's
    batches are means over equally many examples or the task has a `weight`, what one process gives with batches N
    times as large.

    Args:
        recipe: all options; None for the default recipe.
        resume: a folder that holds the state of the run. If it is empty or missing the run begins, else it continues
            and gives the same bits as if it had never been interrupted.
        device: None for what accelerate picks (a GPU if there is one).
        on_progress: called after every optimiser step, on the main process.
        on_best: called with (model, metrics) whenever the weights validate better than all before, on the main process.
        changes: options of the recipe by name: `finetune(model, task, epochs=3, lr=1e-3)`.

    Raises:
        UsageError: accelerate is missing, an option makes no sense, or `resume` holds another run.
        TaskError: the task has no batches or does not give its metric.
    """
    recipe = (recipe or Recipe()).changed(**changes)
    processes = Processes(device, recipe.mixed_precision)
    model.to(processes.device)

    def supervised(batch: Any) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    trainer = Trainer(
        model,
        task,
        [Phase("train", recipe.epochs, recipe.lr, supervised)],
        recipe,
        processes,
        folder=None if resume is None else Path(resume),
        on_progress=on_progress,
        on_best=on_best,
    )
    return trainer.run()
