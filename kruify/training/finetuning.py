"""`finetune`: the way in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.conversion.storing import store_as
from kruify.errors import UsageError
from kruify.layers.storage import marks
from kruify.progress import Progress
from kruify.tasks.base import Task
from kruify.training.distillation import Distillation
from kruify.training.logs import Logs
from kruify.training.processes import Processes
from kruify.training.pruning import GradualPruning
from kruify.training.recipe import Recipe
from kruify.training.result import FinetuneResult
from kruify.training.trainer import OnBest, Phase, Trainer


def finetune(
    model: nn.Module,
    task: Task,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    resume: str | os.PathLike[str] | None = None,
    save_seconds: float = 60.0,
    device: torch.device | str | None = None,
    evaluate_first: bool = True,
    progress: Progress | None = None,
    on_best: OnBest | None = None,
    conditioning: bool = False,
    log_dir: str | os.PathLike[str] | None = None,
    tensorboard: bool = False,
    **changes: Any,
) -> FinetuneResult:
    """Train `model` on `task`, keep the weights that validate best.

    The model is changed in place, and moved to the device. The same code runs in one process and under `torchrun`: N
    processes give what one process gives that adds up N batches per step (`accumulate=N`), and, where the task's
    batches are means over equally many examples or the task has a `weight`, what one process gives with batches N
    times as large.

    Weights that are stored in fewer bits (`kruify.quantize`) are rounded in the forward and the backward pass of the
    last quarter of the run (`ROUNDED_FROM`), and in every validation: the metrics are those of the file.

        result = finetune(small, task, teacher=dense, epochs=3, lr=1e-3)
        print(result.metrics, [entry.loss for entry in result.history])

    A network whose weights are stored in fewer bits (`kruify.quantize`, or a file that holds them so) is trained in
    float32 and rounded at the end; `metrics` are those of the rounded weights.

    Args:
        teacher: the dense network to learn from; it is left alone. Once the network validates better than its teacher
            it learns from the labels alone. The options of the recipe that compare with a teacher have no effect
            without one.
        recipe: all options; None for the default recipe.
        resume: a folder that holds the state of the run. If it is empty or missing the run begins, else it continues
            and gives the same bits as if it had never been interrupted.
        save_seconds: how often the state is written there, apart from every end of an epoch.
        device: None for a GPU if there is one, else the CPU.
        evaluate_first: validate before the first step, so that a run never ends worse than it began.
        progress: called after every optimiser step, on the main process.
        on_best: called with (model, metrics) whenever the weights validate better than all before, on the main process.
        conditioning: measure condition number, spectral norm and unitarity defect of the recurrent matrices and the
            gradient through time at every validation, into the history and the logs.
        log_dir: a folder for `history.csv`, one line per validation.
        tensorboard: write TensorBoard events to `log_dir`, too.
        changes: options of the recipe by name.

    Raises:
        UsageError: accelerate is missing, an option makes no sense, or `resume` holds another run.
        CorruptError: what `resume` holds cannot be read.
        TaskError: the task has no batches or does not give its metric.
    """
    recipe = (recipe or Recipe()).changed(**changes)
    if tensorboard and log_dir is None:
        raise UsageError("TensorBoard needs a folder to write to", "fine-tuning", "Name one with --log-dir")
    processes = Processes(device, recipe.mixed_precision)
    model.to(processes.device)
    pruning = None
    if teacher is not None and recipe.sparse_start:
        pruning = GradualPruning(model, teacher.state_dict(), recipe.sparse_start)
    result = Trainer(
        model,
        task,
        phases(model, task, teacher, recipe),
        recipe,
        processes,
        pruning=pruning,
        teacher=teacher,
        evaluate_first=evaluate_first,
        conditioning=conditioning,
        logs=Logs(log_dir, tensorboard) if log_dir is not None and processes.is_main else None,
        folder=None if resume is None else Path(resume),
        save_seconds=save_seconds,
        progress=progress,
        on_best=on_best,
    ).run()
    if storage := marks(model):
        store_as(model, storage)  # what validated best is rounded; weights that never validated are not
    return result


def phases(model: nn.Module, task: Task, teacher: nn.Module | None, recipe: Recipe) -> list[Phase]:
    """The stages of a run: layer-wise training with a teacher, then training end to end."""

    def supervised(batch: Any, progress: float) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    if teacher is None:
        return [Phase("train", recipe.epochs, recipe.lr, supervised)]
    distillation = Distillation(model, teacher, task, recipe)
    healed, lr = distillation.layer_parameters(), recipe.heal_lr or recipe.lr
    alone = supervised if 0 < recipe.distill_logits < 1 else None  # with 1 there may be no labels
    return [
        Phase("heal", recipe.heal_epochs, lr, distillation.layerwise_loss, healed),
        Phase("train", recipe.epochs, recipe.lr, distillation.loss, alone=alone),
    ]
