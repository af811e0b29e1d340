"""`finetune`: the way in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.tasks.base import Task
from kruify.training.anneal import OverlayAnnealing
from kruify.training.distill import Distillation
from kruify.training.groups import factor_names
from kruify.training.logs import Logs
from kruify.training.processes import Processes
from kruify.training.recipe import Recipe
from kruify.training.result import FinetuneResult, OnProgress
from kruify.training.trainer import Phase, Trainer


def finetune(
    model: nn.Module,
    task: Task,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
    on_best: Callable[[nn.Module, dict[str, float]], None] | None = None,
    conditioning: bool = False,
    log_dir: str | os.PathLike[str] | None = None,
    tensorboard: bool = False,
    **changes: Any,
) -> FinetuneResult:
    """Train `model` on `task`, keep the weights that validate best.

    The model is changed in place, and moved to the device. The same code runs in one process and under `torchrun`: N
    processes give what one process gives that adds up N batches a step (`accumulate=N`), and, where the task's
    batches are means over equally many examples or the task has a `weight`, what one process gives with batches N
    times as large.

    Args:
        teacher: the dense network to learn from; it is left alone. The options of the recipe that compare with a
            teacher have no effect without one.
        recipe: all options; None for the default recipe.
        resume: a folder that holds the state of the run. If it is empty or missing the run begins, else it continues
            and gives the same bits as if it had never been interrupted.
        device: None for what accelerate picks (a GPU if there is one).
        on_progress: called after every optimiser step, on the main process.
        on_best: called with (model, metrics) whenever the weights validate better than all before, on the main process.
        conditioning: measure condition number, spectral norm and unitarity defect of the recurrent matrices and the
            gradient through time at every validation (kruify.training.conditioning), into the history and the logs.
        log_dir: a folder for `history.csv`, one line a validation.
        tensorboard: write TensorBoard events to `log_dir`, too.
        changes: options of the recipe by name: `finetune(model, task, epochs=3, lr=1e-3)`.

    Raises:
        UsageError: accelerate is missing, an option makes no sense, or `resume` holds another run.
        TaskError: the task has no batches or does not give its metric.
    """
    recipe = (recipe or Recipe()).changed(**changes)
    if teacher is None and recipe.distill_only:
        raise UsageError(
            "learning without labels needs a teacher", "fine-tuning", "Name the dense network with --teacher"
        )
    if tensorboard and log_dir is None:
        raise UsageError("TensorBoard needs a folder to write to", "fine-tuning", "Name one with --log-dir")
    processes = Processes(device, recipe.mixed_precision)
    model.to(processes.device)
    trainer = Trainer(
        model,
        task,
        phases_of(model, task, teacher, recipe),
        recipe,
        processes,
        annealing=annealing_of(model, teacher, recipe),
        conditioning=conditioning,
        logs=Logs(log_dir, tensorboard) if log_dir is not None and processes.is_main else None,
        folder=None if resume is None else Path(resume),
        on_progress=on_progress,
        on_best=on_best,
    )
    return trainer.run()


def phases_of(model: nn.Module, task: Task, teacher: nn.Module | None, recipe: Recipe) -> list[Phase]:
    """The stages of a run: healing (with a teacher), the Kronecker matrices alone, everything."""

    def supervised(batch: Any, over: float) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    phases = []
    objective, taught = supervised, False
    if teacher is not None:
        distillation = Distillation(model, teacher, task, recipe)
        if distillation.converted():
            lr = recipe.heal_lr or recipe.lr
            healed = distillation.healed_parameters()
            phases.append(Phase("heal", recipe.heal_epochs, lr, distillation.healing, healed, taught=True))
        if recipe.distill_only or recipe.distill_logits or recipe.distill_hidden:
            objective, taught = distillation.loss, True
    if factors := factor_names(model):
        first = lambda batch, over: objective(batch, 0.0)  # noqa: E731 - `distill_until` is of the last phase
        phases.append(Phase("warm", recipe.warm_epochs, recipe.lr, first, factors, taught=taught))
    phases.append(Phase("train", recipe.epochs, recipe.lr, objective, anneals=True, taught=taught))
    return phases


def annealing_of(model: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> OverlayAnnealing | None:
    """None where there is nothing to anneal: no overlay, or no dense matrix to begin from."""
    if teacher is None or not recipe.overlay_start:
        return None
    dense = teacher.state_dict()
    annealing = OverlayAnnealing(model, dense, recipe.overlay_start, recipe.overlay_until, recipe.overlay_pooled)
    return annealing if annealing.items else None
