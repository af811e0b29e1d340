"""The training loop: a list of phases, each a loss over the train split; validation after every epoch; the best
weights kept.

The position of a run is (phase, step). Everything that the next step depends on is a function of the position or part
of the saved state, so that a run killed at any moment and resumed gives the same bits as one that was left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kruify.checkpoint import make_folder
from kruify.errors import UsageError
from kruify.layers.storage import marks
from kruify.progress import Progress
from kruify.tasks.base import Task, check_loss, check_weight, measure, to_device
from kruify.training import resume
from kruify.training.batches import Batch, count_batches, steps_of_epoch
from kruify.training.logs import Logs
from kruify.training.parameter_groups import parameter_groups
from kruify.training.penalty import default_penalty, unitary_penalty
from kruify.training.processes import Processes
from kruify.training.pruning import GradualPruning
from kruify.training.randomness import isolated_generators, seed_all
from kruify.training.recipe import Recipe
from kruify.training.recurrent_conditioning import recurrent_conditioning
from kruify.training.result import FinetuneResult, Validation
from kruify.training.rounding import ROUNDED_FROM, rounded_weights
from kruify.training.schedule import lr_factor

MAX_SKIPPED = 20  # steps in a row whose gradient is not finite, after which a run counts as diverged
OnBest = Callable[[nn.Module, dict[str, float]], None]


@dataclass(frozen=True)
class Phase:
    """One stage of a run.

    Attributes:
        lr: peak learning rate.
        objective: batch (on the device), share of the phase that is over -> scalar loss.
        only: names of the parameters that it trains; None for all.
        alone: the objective from the validation on in which the network is better than its teacher; None where it
            stays the same.
    """

    name: str
    epochs: float
    lr: float
    objective: Callable[[Any, float], Tensor]
    only: Collection[str] | None = None
    alone: Callable[[Any, float], Tensor] | None = None


@dataclass(eq=False)
class Trainer:
    """Runs phases over a task's train split; sparse residuals are pruned in the last one.

    Attributes:
        phases: those of no epochs are left out.
        teacher: a run is not continued without the one that it began with.
        The others are those of `finetune`.
    """

    model: nn.Module
    task: Task
    phases: list[Phase]
    recipe: Recipe
    processes: Processes
    pruning: GradualPruning | None = None
    teacher: nn.Module | None = None
    evaluate_first: bool = True
    conditioning: bool = False
    logs: Logs | None = None
    folder: Path | None = None
    save_seconds: float = 60.0
    progress: Progress | None = None
    on_best: OnBest | None = None

    def __post_init__(self) -> None:
        weight = self.recipe.unitary_penalty
        self.penalty_weight = default_penalty(self.model) if weight is None else weight
        self.batches = count_batches(self.task, self.recipe.seed)
        self.per_step = self.processes.count * self.recipe.accumulate
        self.steps_per_epoch = math.ceil(self.batches / self.per_step)
        self.phases = [phase for phase in self.phases if phase.epochs > 0]
        self.steps = [max(1, round(phase.epochs * self.steps_per_epoch)) for phase in self.phases]
        self.epochs = [math.ceil(steps / self.steps_per_epoch) for steps in self.steps]
        self.state = resume.RunState()
        self.optimizer: torch.optim.Optimizer | None = None
        # What may not differ between a run and its continuation. Of a sparse residual only the height of its blocks:
        # their number falls while it is pruned.
        self.identity = {
            "recipe": self.recipe.to_json(),
            "shapes": {n: list(p.shape)[n.endswith("overlay.values") :] for n, p in self.model.named_parameters()},
            "batches": [self.batches, self.per_step],
            "teacher": self.teacher is not None,
            "storage": marks(self.model),
        }

    # ------------------------------------------------------------------ where the run stands

    @property
    def finished(self) -> bool:
        return self.state.stopped_early or self.state.phase == len(self.phases)

    @property
    def steps_done(self) -> int:
        return sum(self.steps[: self.state.phase]) + self.state.step

    @property
    def epochs_done(self) -> int:
        return sum(self.epochs[: self.state.phase]) + math.ceil(self.state.step / self.steps_per_epoch)

    def seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self._started

    # ------------------------------------------------------------------ the run

    def run(self) -> FinetuneResult:
        self._started = self._saved_at = time.monotonic()
        with isolated_generators():
            saved = self._restore()
            self.processes.share(self.model)
            if saved is None:
                if self.pruning is not None:
                    self.pruning.grow()
                if self.evaluate_first:
                    self._validate("start", lr=0.0)
                self._save()  # the weights that the run began with: a resumed run needs no others
            moments = None if saved is None else saved.moments
            while not self.finished:
                self._run_phase(self.phases[self.state.phase], self.steps[self.state.phase], moments)
                moments = None
            self._save()
        best = self.state.best
        if best is not None:
            self._load(best.weights)
        return FinetuneResult(
            model=self.model,
            history=tuple(self.state.history),
            metrics=dict(best.metrics) if best else {},
            best_epoch=best.epoch if best else 0,
            steps=self.steps_done,
            seconds=self.seconds(),
            stopped_early=self.state.stopped_early,
            is_main=self.processes.is_main,
        )

    def _run_phase(self, phase: Phase, steps: int, moments: dict[int, Any] | None) -> None:
        groups = parameter_groups(self.model, self.recipe, phase.only)
        if not groups:
            raise UsageError(f"the network has no parameters to train in phase '{phase.name}'", "fine-tuning")
        trained = {id(p) for group in groups for p in group["params"]}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in trained]
        # Not fused: torch's fused step changes parameters without counting a version, on which caches of merged
        # weights rely.
        self.optimizer = torch.optim.AdamW(groups, lr=phase.lr, foreach=True)
        if moments is not None:
            self._load_moments(moments)
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            while self.state.step < steps and not self.finished:
                self._run_epoch(phase, steps)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        if not self.finished:
            self.state.phase, self.state.step = self.state.phase + 1, 0
        self.optimizer = None

    def _run_epoch(self, phase: Phase, steps: int) -> None:
        """From the current position to the end of its epoch, or of the phase."""
        assert self.optimizer is not None
        state, first = self.state, self.state.step
        end = min((first // self.steps_per_epoch + 1) * self.steps_per_epoch, steps)
        epoch = steps_of_epoch(
            self.task,
            self.recipe.seed,
            sum(self.epochs[: state.phase]) + first // self.steps_per_epoch,
            limit=self.batches,
            per_step=self.per_step,
            skip=first % self.steps_per_epoch,
            rank=self.processes.rank,
            processes=self.processes.count,
        )
        self.model.train()
        for batches in epoch:
            progress = state.step / steps
            share = lr_factor(self.recipe.schedule, progress, self.recipe.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = phase.lr * group["share"] * share
            if self.pruning is not None and phase is self.phases[-1]:
                self.pruning.prune(progress, self.optimizer)
            self._one_step(phase, batches, progress)
            state.step += 1
            self._report(phase)
            if state.step == end:
                break
            if time.monotonic() - self._saved_at > self.save_seconds:
                self._save()
        if state.step > first and not state.weight_sum:
            self._diverged(phase, "no step of the epoch has a")
        state.step = end  # an epoch that came out shorter than counted ends all the same
        lr = phase.lr * lr_factor(self.recipe.schedule, end / steps, self.recipe.warmup)
        self._validate(phase.name, lr)
        self._report(phase)
        if phase.alone is not None and not state.alone and end < steps:
            state.alone = self._overtaken()
        state.stopped_early = 0 < self.recipe.patience <= state.stale
        self._save()

    def _overtaken(self) -> bool:
        """Whether the weights that validated best are better than the teacher's: it would hold them back."""
        best, metric = self.state.best, self.task.metric
        if best is None:
            return False
        return better(best.metrics[metric], self._teacher_metrics[metric], self.task.higher_is_better)

    @cached_property
    def _teacher_metrics(self) -> dict[str, float]:
        teacher = self.teacher
        assert teacher is not None
        return self.processes.from_main(lambda: measure(self.task, teacher, "valid", known=True))

    def _one_step(self, phase: Phase, batches: list[Batch], progress: float) -> None:
        assert self.optimizer is not None
        state, trained = self.state, [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = None
        rounding = phase is self.phases[-1] and progress >= ROUNDED_FROM
        with rounded_weights(self.model, state.scales) if rounding else nullcontext():
            weight_sum, loss_sum = self._gradients(phase, batches, progress, trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip or math.inf)
        if not math.isfinite(loss_sum) or not math.isfinite(float(norm)):
            state.skipped += 1
            if state.skipped >= MAX_SKIPPED:
                self._diverged(phase, f"{MAX_SKIPPED} steps in a row have no")
            return
        state.skipped = 0
        state.loss_sum, state.weight_sum = state.loss_sum + loss_sum, state.weight_sum + weight_sum
        self.optimizer.step()

    def _gradients(
        self, phase: Phase, batches: list[Batch], progress: float, trained: list[nn.Parameter]
    ) -> tuple[float, float]:
        """Puts the gradients of the mean loss and the penalty on the parameters `trained`.

        Returns:
            the sums of the batches' weights, and of their losses by these.
        """
        state = self.state
        objective = phase.alone if state.alone and phase.alone is not None else phase.objective
        weight_sum = loss_sum = 0.0
        for number, batch in batches:
            seed_all(self.recipe.seed, "step", state.phase, state.step // self.steps_per_epoch, number)
            weight = check_weight(self.task.weight(batch), self.task)
            with self.processes.autocast():
                loss = check_loss(objective(to_device(batch, self.processes.device), progress), self.task)
            (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]
            weight_sum, loss_sum = weight_sum + weight, loss_sum + weight * float(loss.detach())
        weight_sum, loss_sum = self.processes.sum_gradients(trained, [weight_sum, loss_sum])
        if weight_sum != 1.0:
            torch._foreach_div_([p.grad for p in trained if p.grad is not None], weight_sum)
        if self.penalty_weight:
            # After the sum: the penalty is a property of the weights, not of the batches.
            penalty = self.penalty_weight * unitary_penalty(self.model)
            if penalty.requires_grad:
                penalty.backward()  # type: ignore[no-untyped-call]
        return weight_sum, loss_sum

    def _diverged(self, phase: Phase, what: str) -> NoReturn:
        hint = f"Lower lr (it is {phase.lr:g}) or the clipping norm"
        raise UsageError(f"training diverged: {what} finite gradient", "fine-tuning", hint)

    def _validate(self, phase: str, lr: float) -> None:
        """Evaluate on "valid", add to the history, keep the weights if they are the best so far: all of them rounded as
        they are stored."""
        with rounded_weights(self.model, self.state.scales or None):
            self._validate_rounded(phase, lr)

    def _validate_rounded(self, phase: str, lr: float) -> None:
        state, task = self.state, self.task
        metrics = self.processes.from_main(lambda: measure(task, self.model, "valid", known=not state.history))
        conditioning = None
        if self.conditioning:
            conditioning = self.processes.from_main(lambda: recurrent_conditioning(self.model, task, self.recipe.seed))
        with torch.no_grad():
            penalty = float(unitary_penalty(self.model))
        loss = state.loss_sum / state.weight_sum if state.weight_sum else None
        entry = Validation(phase, self.epochs_done, self.steps_done, loss, penalty, lr, metrics, conditioning)
        state.loss_sum = state.weight_sum = 0.0
        state.history.append(entry)
        if self.logs is not None and self.processes.is_main:
            self.logs.write(state.history)
        if self.pruning is not None and not self.pruning.done:
            return  # a network whose sparse residuals are still too large cannot be the best one
        best = state.best
        if best is not None and not better(metrics[task.metric], best.metrics[task.metric], task.higher_is_better):
            state.stale += 1
            return
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        state.best, state.stale = resume.Best(entry.epoch, metrics, weights), 0
        if self.on_best is not None and self.processes.is_main:
            self.on_best(self.model, metrics)

    # ------------------------------------------------------------------ the saved state

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.folder is not None and self.processes.is_main:
            moments = None if self.optimizer is None else self.optimizer.state_dict()["state"]
            state = replace(self.state, seconds=self.seconds())
            resume.save(self.folder, resume.Saved(self.identity, state, self.model.state_dict(), moments))

    def _restore(self) -> resume.Saved | None:
        if self.folder is None:
            return None
        make_folder(self.folder)
        saved = resume.load(self.folder, self.identity)
        self.processes.wait()  # the main process must not write before all have read
        if saved is None:
            return None
        with resume.checked(self.folder):
            state, weights = saved.state, saved.state.best.weights if saved.state.best else self.model.state_dict()
            if not (0 <= state.phase <= len(self.phases) and 0 <= state.step <= [*self.steps, 0][state.phase]):
                raise ValueError(f"there is no step {state.step} of phase {state.phase}")
            if _shapes(weights) != _shapes(self.model.state_dict()):
                raise ValueError("the best weights are of another network")
            self._load(saved.model)
            if state.scales:
                state.scales = to_device(state.scales, self.processes.device)
                with rounded_weights(self.model, state.scales):
                    pass  # scales that do not fit the network raise
        self.state = state
        return saved

    def _load(self, state: Mapping[str, Tensor]) -> None:
        if self.pruning is not None:
            self.pruning.resize(state)
        self.model.load_state_dict(state)

    def _load_moments(self, moments: dict[int, Any]) -> None:
        assert self.optimizer is not None and self.folder is not None
        with resume.checked(self.folder):
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            for parameter, found in self.optimizer.state.items():
                shapes = {name: tuple(value.shape) for name, value in found.items()}
                expected = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                if shapes != expected or not found["step"] >= 0:
                    raise ValueError("the optimiser's moments do not fit the network")

    # ------------------------------------------------------------------ progress

    def _report(self, phase: Phase) -> None:
        if self.progress is None or not self.processes.is_main:
            return
        state, last = self.state, self.state.history[-1] if self.state.history else None
        loss = state.loss_sum / state.weight_sum if state.weight_sum else last.loss if last else None
        text = f"{phase.name} epoch {max(1, self.epochs_done)}/{sum(self.epochs)}"
        found = [] if loss is None else [f"training loss {loss:.3f}"]
        found += [f"{self.task.metric} {last.metrics[self.task.metric]:.3f}"] if last else []
        self.progress(self.steps_done, sum(self.steps), ": ".join([text, *filter(None, [" ".join(found)])]))


def better(value: float, than: float, higher_is_better: bool) -> bool:
    """Whether `value` is the better metric; nan is worse than everything."""
    if math.isnan(value):
        return False
    return math.isnan(than) or (value > than if higher_is_better else value < than)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
