"""Learning from the dense network: its outputs, its hidden states, and one layer at a time.

Conversion keeps every size, so the student's hidden states are compared with the teacher's as they are, without a
projection (KroneckerBERT, Tahaei et al. 2021, and KnGPT2, Edalati et al. 2022, found the intermediate states to
matter more than the logits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.errors import UsageError
from kruify.layers.matrix import KroneckerMatrix
from kruify.tasks.base import Task, evaluating
from kruify.training.recipe import Recipe
from kruify.training.recurrent import Call, recorded, recurrent_layers
from kruify.training.teacher import prepared

OUTPUTS = ("softmax", "sigmoid", "values")


class Distillation:
    """The losses between a student and its teacher.

    Args:
        model: the student. The teacher's recurrent layers are looked up in it by name.
        teacher: the dense network; a copy without gradients is used.

    Raises:
        UsageError: the two have no recurrent layer in common, by name and size.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, task: Task, recipe: Recipe) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        device = next(model.parameters()).device
        students, teachers = recurrent_layers(model), recurrent_layers(teacher)
        self.layers = [n for n, module in students.items() if n in teachers and _size(module) == _size(teachers[n])]
        if not self.layers and (recipe.distill_hidden or recipe.heal_epochs):
            raise UsageError(
                f"the teacher has no recurrent layer of the network's: {_named(teachers)} against {_named(students)}",
                "fine-tuning",
                "Give the dense network that was converted, or distill_hidden=0 for a teacher of another shape",
            )
        self.teacher = prepared(teacher, device, self.converted())

    def loss(self, batch: Any, over: float = 0.0) -> Tensor:
        """(1 - a) * task loss + a * distance of the outputs + b * distance of the hidden states; the task loss falls
        away with `distill_only`.

        Args:
            over: share of the last phase that is over; a and b fall with it where the recipe has `distill_until`.
        """
        recipe = self.recipe
        until = None if recipe.distill_only else recipe.distill_until
        taught = 1.0 if until is None else max(0.0, 1 - over / until)
        if not taught:
            return self.task.loss(self.task.forward(self.model, batch), batch)
        wanted = self.layers if recipe.distill_hidden else []
        with evaluating(self.teacher), recorded(self.teacher, wanted) as theirs:
            targets = self.task.forward(self.teacher, batch)
        with recorded(self.model, wanted) as ours:
            outputs = self.task.forward(self.model, batch)
        share = 1.0 if recipe.distill_only else taught * recipe.distill_logits
        loss = outputs.new_zeros(())
        if share < 1:
            loss = loss + (1 - share) * self.task.loss(outputs, batch)
        if share > 0:
            loss = loss + share * output_distance(outputs, targets, output_kind(self.task), recipe.temperature)
        if wanted:
            loss = loss + taught * recipe.distill_hidden * hidden_distance(ours, theirs)
        return loss

    def healing(self, batch: Any, over: float = 0.0) -> Tensor:
        """Every converted layer by itself: the teacher's inputs go in, the teacher's outputs should come out.

        No error of one layer reaches another, and no labels are needed.
        """
        return torch.stack(list(self.distances(batch).values())).mean()

    def distances(self, batch: Any) -> dict[str, Tensor]:
        """Converted layer -> distance of its answers to the teacher's inputs from the teacher's answers."""
        layers = self.converted()
        with evaluating(self.teacher), recorded(self.teacher, layers) as theirs:
            self.task.forward(self.teacher, batch)
        distances = {}
        for name in layers:
            module = self.model.get_submodule(name)
            with recorded(self.model, [name]) as calls:
                for call in theirs[name]:
                    module(*call.args, **call.kwargs)
            distances[name] = hidden_distance(calls, {name: theirs[name]})
        return distances

    def converted(self) -> list[str]:
        """The layers that hold a Kronecker matrix and that the teacher has, too."""
        modules = {name: self.model.get_submodule(name) for name in self.layers}
        return [n for n, layer in modules.items() if any(isinstance(m, KroneckerMatrix) for m in layer.modules())]

    def healed_parameters(self) -> set[str]:
        """Names of the parameters of the converted layers."""
        prefixes = tuple(f"{name}." if name else "" for name in self.converted())
        return {name for name, _ in self.model.named_parameters() if name.startswith(prefixes)}


def output_kind(task: Task) -> str:
    """What `forward` gives: "softmax" or "sigmoid" logits, or "values" (the default: they are compared as numbers)."""
    kind = task.output_kind
    if kind not in OUTPUTS:
        raise UsageError(f"output_kind must be one of {', '.join(OUTPUTS)}, got {kind!r}", type(task).__name__)
    return kind


def output_distance(outputs: Tensor, targets: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """How far the outputs are from the teacher's, a scalar.

    "softmax": T^2 KL(teacher || student) of the last dimension (Hinton et al. 2015), the mean over the others.
    "sigmoid": the same, each number by itself. "values": squared distance as a share of the teacher's variance (Ba &
    Caruana 2014).
    """
    if kind == "values":
        variance = targets.var(correction=0).clamp_min(torch.finfo(targets.dtype).tiny)
        return functional.mse_loss(outputs, targets) / variance
    if kind == "sigmoid":
        soft = torch.sigmoid(targets / temperature)
        # Not binary_cross_entropy(soft, soft): autocast on CUDA refuses it.
        entropy = functional.binary_cross_entropy_with_logits(targets / temperature, soft, reduction="none")
        cross = functional.binary_cross_entropy_with_logits(outputs / temperature, soft, reduction="none")
        divergence = temperature**2 * (cross - entropy)
        return (divergence.sum(-1) if divergence.ndim > 1 else divergence).mean()
    student = functional.log_softmax(outputs / temperature, dim=-1).flatten(0, -2)
    teacher = functional.log_softmax(targets / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hidden_distance(ours: Mapping[str, list[Call]], theirs: Mapping[str, list[Call]]) -> Tensor:
    """||ours - theirs||^2 / ||theirs||^2, the mean over layers and calls, and over sequence and final states alike."""
    distances = []
    for name, calls in theirs.items():
        if len(calls) != len(ours[name]):
            raise UsageError(
                f"the teacher runs it {len(calls)} times a batch, the network {len(ours[name])} times", name
            )
        for mine, other in zip(ours[name], calls, strict=True):
            for a, b in zip(mine.outputs, other.outputs, strict=True):
                distances.append((a - b).square().sum() / b.square().sum().clamp_min(1e-12))
    return torch.stack(distances).mean()


def _size(module: nn.Module) -> tuple[Any, ...]:
    fields = ("hidden_size", "num_layers", "bidirectional", "proj_size")
    return tuple(getattr(module, name, None) or 0 for name in fields)


def _named(layers: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name or '(itself)'} of {_size(module)[0]} units" for name, module in layers.items()) or "none"
