"""A task: the data, the loss and the metric that a network is judged by.

Everything that needs data (calibration, fine-tuning, evaluation, reports) goes through a `Task`. A user writes one in
one file:

    from kruify.task import Task

    class Digits(Task):
        metric, higher_is_better = "accuracy", True

        def model(self): return MyNetwork()
        def batches(self, split, *, seed=0): ...             # yields batches, whatever they are
        def forward(self, model, batch): return model(batch[0])
        def loss(self, outputs, batch): return torch.nn.functional.cross_entropy(outputs, batch[1])
        def evaluate(self, model, split): ...                # {"accuracy": 0.97}; leave it out for the mean loss

and names it on the command line as `--task path/to/digits.py:Digits`. A task file is a program: it runs. It is named by
the user, never by a checkpoint.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kruify.errors import TaskError

SPLITS = ("train", "valid", "test")


class Task(ABC):
    """What a network is for. Subclass it; constructor arguments with defaults become options (`name:key=value`)."""

    metric: str = "loss"
    """Key of `evaluate`'s result that decides between two networks."""
    higher_is_better: bool = False
    """Whether a greater `metric` is the better one."""
    measures: str = ""
    """One sentence: what the task measures."""
    chance: str = ""
    """One sentence: what a network that learnt nothing gets."""
    output_kind: str = "values"
    """What `forward` gives: "softmax" or "sigmoid" logits in the last dimension, or "values". Distillation asks."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a freshly initialised dense network, in the shape whose state dict a checkpoint of this task holds."""

    @abstractmethod
    def batches(self, split: str, *, seed: int = 0) -> Iterable[Any]:
        """Return the batches of `split` ("train", "valid" or "test"), on the CPU.

        A batch is anything that `forward` and `loss` understand: tensors, or tuples, lists or dicts of them, or an
        object with a method `to(device)`. For "train" the order follows from `seed` alone; the other splits do not
        depend on it.
        """

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the outputs (logits, predictions) of `model` for `batch`; both are on the model's device."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the scalar training loss of `outputs` = forward(model, batch).

        A task of inputs without labels has none: `convert` only runs the network on it.
        """
        where, hint = type(self).__name__, "Write def loss(self, outputs, batch)"
        raise TaskError("it has no loss, which training and evaluation ask for", where=where, hint=hint)

    @property
    def has_loss(self) -> bool:
        """Whether `loss` is written."""
        return type(self).loss is not Task.loss

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the metrics of `model` on `split`; `self.metric` is one of the keys.

        This default is the mean of the batches' losses under the name "loss".
        """
        losses = []
        with evaluating(model) as device:
            for batch in check_batches(self.batches(split), self):
                batch = to_device(batch, device)
                losses.append(float(one_number(self.loss(self.forward(model, batch), batch), self)))
        if not losses:
            raise TaskError(f'split "{split}" has no batches', where=type(self).__name__)
        return {"loss": sum(losses) / len(losses)}

    def weight(self, batch: Any) -> float:
        """Return the weight of `batch` among others: how many examples (tokens, frames) its mean loss is over.

        With 1, the default, all batches of an optimiser step count alike.
        """
        return 1.0

    def examples(self, split: str) -> int | None:
        """Return how many examples `evaluate` looks at in `split`, None where that is unknown."""
        return None

    def published(self) -> dict[str, Tensor]:
        """Return the state dict of a trained network that others published for this task, in `model`'s names."""
        raise TaskError("there is no published network for this task", where=type(self).__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put `model` in evaluation mode without gradients, yield its device, put the mode back afterwards.

    `no_grad`, not `inference_mode`: a layer may keep a tensor that it made here and meet it again in training.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module in was_training:
            module.training = True


def check_task(task: Task) -> Task:
    """Return `task` if its methods can be called, `batches` with a seed; TaskError otherwise."""
    where = type(task).__name__
    for name in (name for name, held in vars(Task).items() if callable(held)):
        if not callable(found := getattr(task, name)):
            hint = f"Write def {name}(self, ...); `pydoc kruify.task` explains it"
            raise TaskError(f"its {name} is {_a(found)}, not a method", where=where, hint=hint)
    takes = inspect.signature(task.batches).parameters
    if "seed" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise TaskError("batches() takes no seed", where=where, hint="Write batches(self, split, *, seed=0)")
    return task


def fresh_model(task: Task) -> nn.Module:
    """Return `task.model()`; TaskError where that is no module."""
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() gave {_a(model)}, not a torch.nn.Module", where=type(task).__name__)
    return model


def measure(task: Task, model: nn.Module, split: str, *, known: bool = False) -> dict[str, float]:
    """Return `task.evaluate(model, split)` as plain numbers, `task.metric` among them.

    Args:
        known: whether everything that follows compares with this metric, so that NaN will not do.

    Raises:
        TaskError: it is something else.
    """
    where = type(task).__name__
    found: Any = task.evaluate(model, split)
    if not isinstance(found, Mapping):
        raise TaskError(f'evaluate() gave {_a(found)}, not a dict such as {{"{task.metric}": 0.5}}', where=where)
    metrics: dict[str, float] = {}
    for name, value in found.items():
        try:
            metrics[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TaskError(f"evaluate() gave {_a(value)} as '{name}', not a number", where=where) from None
    if task.metric not in metrics:
        raise TaskError(
            f"evaluate() gave {', '.join(metrics) or 'nothing'}, but not the metric '{task.metric}'", where=where
        )
    if known and math.isnan(metrics[task.metric]):
        raise TaskError(
            f"evaluate() gave NaN as '{task.metric}' on the {split} split, so nothing can be compared with it",
            where=where,
            hint="See that the split has batches and the network finite outputs",
        )
    return metrics


def check_batches(batches: Any, task: Task) -> Iterable[Any]:
    """Return what `task.batches` gave if it can be iterated over; TaskError otherwise."""
    if not isinstance(batches, Iterable):
        raise TaskError(
            f"batches() gave {_a(batches)}, nothing to iterate over",
            where=type(task).__name__,
            hint="Yield batches, or return a list or a DataLoader",
        )
    return batches


def check_weight(weight: Any, task: Task) -> float:
    """Return `weight` as a float if it is a finite number above 0; TaskError otherwise."""
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not 0 < number < math.inf:
        raise TaskError(f"weight() gave {str(weight)[:50]}, not a number above 0", where=type(task).__name__)
    return number


def check_loss(loss: Any, task: Task) -> Tensor:
    """Return `loss` if training can use it: one number with a gradient; TaskError otherwise."""
    if not one_number(loss, task).requires_grad:
        raise TaskError(
            "loss() gave a number without a gradient",
            where=type(task).__name__,
            hint="Compute it from `outputs` without detach(), item() or argmax()",
        )
    return cast(Tensor, loss)


def one_number(loss: Any, task: Task) -> Tensor:
    """Return `loss` if it is one real number in a tensor; TaskError otherwise."""
    if isinstance(loss, Tensor) and loss.is_complex():
        raise TaskError("loss() gave a complex number", where=type(task).__name__, hint="Take its real part or abs()")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise TaskError(f"loss() gave {_a(loss)}{shape}, not one number in a tensor", where=type(task).__name__)
    return loss


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter (CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`; looks into tuples, lists, dicts; others have `.to`."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, tuple):
        items = [to_device(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def check_split(split: str) -> Literal["train", "valid", "test"]:
    """Return `split` if it is one of the three; TaskError otherwise."""
    if split not in SPLITS:
        raise TaskError(f'there is no split "{split}"', hint=f"The splits are {', '.join(SPLITS)}")
    return cast(Literal["train", "valid", "test"], split)
