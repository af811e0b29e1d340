"""Learning from the dense network: its outputs, or the outputs of its layers, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.errors import UsageError
from kruify.layers.matrix import KroneckerMatrix
from kruify.tasks.base import Task, device_of, evaluating
from kruify.training.recipe import Recipe
from kruify.training.recurrent import Call, recorded, recurrent_layers
from kruify.training.teacher import frozen_teacher

OUTPUTS = ("softmax", "sigmoid", "values")


class Distillation:
    """The losses between a student and its teacher.

    Args:
        model: the student. The teacher's recurrent layers are looked up in it by name.
        teacher: the dense network; a copy without gradients is used.

    Attributes:
        layers: the converted layers that the teacher has, too, by name and size.

    Raises:
        UsageError: there is no such layer, and the recipe asks for layer-wise training.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, task: Task, recipe: Recipe) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        students, teachers = recurrent_layers(model), recurrent_layers(teacher)
        self.layers = [
            name
            for name, layer in students.items()
            if any(isinstance(module, KroneckerMatrix) for module in layer.modules())
            and name in teachers
            and _size(layer) == _size(teachers[name])
        ]
        if not self.layers and recipe.heal_epochs:
            raise UsageError(
                "layer-wise training needs a converted layer that the teacher has, too: the teacher has "
                f"{_listed(teachers)}, the network {_listed(students)}",
                "fine-tuning",
                "Give the dense network that was converted, or heal_epochs=0",
            )
        self.teacher = frozen_teacher(teacher, device_of(model), self.layers)

    def loss(self, batch: Any, progress: float = 0.0) -> Tensor:
        """(1 - a) * task loss + a * distance of the outputs from the teacher's, where a is `distill_logits`.

        Args:
            progress: share of the phase that is over; a is annealed with it where the recipe has `distill_until`.
        """
        share, until = self.recipe.distill_logits, self.recipe.distill_until
        if until is not None:
            share *= max(0.0, 1 - progress / until)
        if not share:
            return self.task.loss(self.task.forward(self.model, batch), batch)
        with evaluating(self.teacher):
            targets = self.task.forward(self.teacher, batch)
        outputs = self.task.forward(self.model, batch)
        distance = output_distance(outputs, targets, output_kind(self.task))
        # With 1 the labels are not used at all.
        return distance if share == 1 else (1 - share) * self.task.loss(outputs, batch) + share * distance

    def layerwise_loss(self, batch: Any, progress: float = 0.0) -> Tensor:
        """Mean over the layers: each by itself gets the teacher's inputs, and should give the teacher's outputs.

        No error of one layer reaches another, and no labels are needed.
        """
        with evaluating(self.teacher), recorded(self.teacher, self.layers) as theirs:
            self.task.forward(self.teacher, batch)
        distances = []
        for name in self.layers:
            layer = self.model.get_submodule(name)
            with recorded(self.model, [name]) as ours:
                for call in theirs[name]:
                    layer(*call.args, **call.kwargs)
            distances.append(relative_error(ours[name], theirs[name]))
        return torch.stack(distances).mean()

    def layer_parameters(self) -> set[str]:
        """Names of the parameters of `layers`."""
        prefixes = tuple(f"{name}." if name else "" for name in self.layers)
        return {name for name, _ in self.model.named_parameters() if name.startswith(prefixes)}


def output_kind(task: Task) -> str:
    """What `forward` gives: "softmax" or "sigmoid" logits, or "values" (the default: they are compared as numbers)."""
    kind = task.output_kind
    if kind not in OUTPUTS:
        raise UsageError(f"output_kind must be one of {', '.join(OUTPUTS)}, got {kind!r}", type(task).__name__)
    return kind


def output_distance(outputs: Tensor, targets: Tensor, kind: str) -> Tensor:
    """How far the outputs are from the teacher's, a scalar.

    "softmax": KL(teacher || student) over the last dimension (Hinton et al. 2015), the mean over the others.
    "sigmoid": the same, of each number by itself. "values": mean squared distance over the teacher's variance (Ba &
    Caruana 2014).
    """
    if kind == "values":
        variance = targets.var(correction=0).clamp_min(torch.finfo(targets.dtype).tiny)
        return functional.mse_loss(outputs, targets) / variance
    if kind == "sigmoid":
        soft = torch.sigmoid(targets)
        # Not binary_cross_entropy(soft, soft): autocast on CUDA refuses it.
        entropy = functional.binary_cross_entropy_with_logits(targets, soft, reduction="none")
        divergence = functional.binary_cross_entropy_with_logits(outputs, soft, reduction="none") - entropy
        return (divergence.sum(-1) if divergence.ndim > 1 else divergence).mean()
    student = functional.log_softmax(outputs, dim=-1).flatten(0, -2)
    teacher = functional.log_softmax(targets, dim=-1).flatten(0, -2)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def relative_error(ours: Sequence[Call], theirs: Sequence[Call]) -> Tensor:
    """||ours - theirs||^2 / ||theirs||^2, the mean over calls, and over output sequence and final states alike."""
    return torch.stack(
        [
            (a - b).square().sum() / b.square().sum().clamp_min(1e-12)
            for mine, other in zip(ours, theirs, strict=True)
            for a, b in zip(mine.outputs, other.outputs, strict=True)
        ]
    ).mean()


def _size(module: nn.Module) -> tuple[Any, ...]:
    fields = ("hidden_size", "num_layers", "bidirectional", "proj_size")
    return tuple(getattr(module, name, None) or 0 for name in fields)


def _listed(layers: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name or '(itself)'} of {_size(module)[0]} units" for name, module in layers.items()) or "none"
