"""The training loop: a list of phases, each a loss over the train split; validation after every epoch; the best
weights kept.

The run's position is (phase, step). Everything that the next step depends on is a function of the position or stands
in the saved state, so that a run killed at any moment and resumed gives the same bits as one that was left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.tasks.base import Task, check_loss, measure, to_device
from kruify.training.anneal import OverlayAnnealing
from kruify.training.codropout import CoMatrixDropout
from kruify.training.conditioning import measure as measure_conditioning
from kruify.training.ema import Average
from kruify.training.feed import Batch, count_batches, groups
from kruify.training.groups import parameter_groups
from kruify.training.logs import Logs
from kruify.training.penalty import default_penalty, unitary_penalty
from kruify.training.processes import Processes
from kruify.training.randomness import isolated, seed_all
from kruify.training.recipe import Recipe
from kruify.training.result import FinetuneResult, OnProgress, Progress
from kruify.training.schedule import lr_factor
from kruify.training.state import check_same_run, load_state, save_state

SAVED = ("phase", "step", "history", "best", "stale", "loss_sum", "weight_sum", "finished", "stopped_early")
MAX_SKIPPED = 20  # steps in a row whose gradient is not finite, after which a run counts as diverged


@dataclass(frozen=True)
class Phase:
    """One stage of a run.

    Attributes:
        objective: batch (on the device), share of the phase that is over -> scalar loss.
        only: names of the parameters that it trains; None for all.
        anneals: whether overlays are pruned in it.
        taught: whether the objective compares with a teacher.
    """

    name: str
    epochs: float
    lr: float
    objective: Callable[[Any, float], Tensor]
    only: Collection[str] | None = None
    anneals: bool = False
    taught: bool = False


class Trainer:
    """Runs phases over a task's train split. `finetune` is the way in; this class holds the state between steps."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        phases: Sequence[Phase],
        recipe: Recipe,
        processes: Processes,
        *,
        annealing: OverlayAnnealing | None = None,
        conditioning: bool = False,
        logs: Logs | None = None,
        folder: Path | None = None,
        on_progress: OnProgress | None = None,
        on_best: Callable[[nn.Module, dict[str, float]], None] | None = None,
    ) -> None:
        self.model, self.task, self.recipe, self.processes = model, task, recipe, processes
        self.phases = [phase for phase in phases if phase.epochs > 0]
        self.annealing, self.conditioning, self.logs = annealing, conditioning, logs
        self.folder, self.on_progress, self.on_best = folder, on_progress, on_best
        weight = recipe.unitary_penalty
        self.penalty_weight = default_penalty(model) if weight is None else weight
        self.batches = count_batches(task, recipe.seed)
        self.group = processes.count * recipe.accumulate
        self.steps_per_epoch = math.ceil(self.batches / self.group)
        self.average: Average | None = None
        self.dropout = CoMatrixDropout(model, recipe.overlay_dropout) if recipe.overlay_dropout else None
        # What a saved state holds (SAVED), beside the tensors:
        self.phase, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.stale = 0  # validations since the best one
        self.loss_sum, self.weight_sum = 0.0, 0.0
        self.seconds_before = 0.0
        self.finished, self.stopped_early = False, False
        self.optimizer: torch.optim.Optimizer | None = None
        self._skipped = 0
        self._paced: tuple[int, float] | None = None  # (steps done, seconds) after this process's first step

    # ------------------------------------------------------------------ the run

    def run(self) -> FinetuneResult:
        self._started = self._saved_at = time.monotonic()
        with isolated():
            saved = self._restore()
            self.processes.share(self.model)
            if saved is None:
                if self.annealing is not None:
                    self.annealing.grow()
                if self.recipe.ema:
                    self.average = Average(self.model, self.recipe.ema)
                if self.recipe.evaluate_first:
                    self._validate("start", lr=0.0)
                self._save()  # the weights that the run began with: a resumed run needs no others
            while not self.finished:
                if self.phase >= len(self.phases):
                    self.finished = True
                    break
                self._run_phase(self.phases[self.phase], saved)
                saved = None
            self._save()
        if self.best is not None:
            self._load(self.best["state"])
        return FinetuneResult(
            model=self.model,
            history=self.history,
            metrics=dict(self.best["metrics"]) if self.best else {},
            best_epoch=self.best["epoch"] if self.best else 0,
            steps=self._steps_before() + self.step,
            seconds=self._seconds(),
            stopped_early=self.stopped_early,
            is_main=self.processes.is_main,
        )

    def _run_phase(self, phase: Phase, saved: dict[str, Any] | None) -> None:
        steps = self._phase_steps(phase)
        param_groups = parameter_groups(self.model, self.recipe, phase.only)
        if not param_groups:
            raise UsageError(f"the network has no parameters to train in phase '{phase.name}'", "fine-tuning")
        trained = {id(p) for g in param_groups for p in g["params"]}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in trained]
        # Not fused: torch's fused step changes parameters without counting a version, on which caches of merged
        # weights rely.
        self.optimizer = torch.optim.AdamW(param_groups, lr=phase.lr, foreach=True)
        if saved is not None and saved["optimizer"] is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            while self.step < steps and not self.finished:
                self._run_epoch(phase, steps)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        if not self.finished:
            self.phase, self.step = self.phase + 1, 0
        self.optimizer = None

    def _run_epoch(self, phase: Phase, steps: int) -> None:
        """From the current position to the end of its epoch, or of the phase."""
        assert self.optimizer is not None
        first, in_phase = self.step, self.step // self.steps_per_epoch
        end = min((in_phase + 1) * self.steps_per_epoch, steps)
        feed = groups(
            self.task,
            self.recipe.seed,
            self._epoch(),
            limit=self.batches,
            size=self.group,
            skip=self.step % self.steps_per_epoch,
            rank=self.processes.rank,
            processes=self.processes.count,
        )
        self.model.train()
        for batches in feed:
            over = self.step / steps
            share = lr_factor(self.recipe.schedule, over, self.recipe.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = phase.lr * group["share"] * share
            if phase.anneals and self.annealing is not None:
                self.annealing.prune(over, self.optimizer, self.average)
            self._one_step(phase, batches, over)
            self.step += 1
            self._report(phase, phase.lr * share)
            if self.step == end:
                break
            self._save_if_due()
        if self.step > first and not self.weight_sum:
            self._diverged(phase, "no step of the epoch has a")
        self.step = end  # an epoch that came out shorter than counted ends all the same
        lr = phase.lr * lr_factor(self.recipe.schedule, self.step / steps, self.recipe.warmup)
        self._validate(phase.name, lr)
        self._report(phase, lr)
        if self.recipe.patience and self.stale >= self.recipe.patience:
            self.finished = self.stopped_early = True
        self._save()

    def _one_step(self, phase: Phase, batches: list[Batch], over: float) -> None:
        assert self.optimizer is not None
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = None
        weight_sum = loss_sum = 0.0
        with self.dropout.applied(self.recipe.seed, self.phase, self.step) if self.dropout else nullcontext():
            for number, batch in batches:
                seed_all(self.recipe.seed, "step", self.phase, self.step // self.steps_per_epoch, number)
                weight = float(self.task.weight(batch))
                with self.processes.autocast():
                    loss = check_loss(phase.objective(to_device(batch, self.processes.device), over), self.task)
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
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip or math.inf)
        if not math.isfinite(loss_sum) or not math.isfinite(float(norm)):
            self._skipped += 1
            if self._skipped >= MAX_SKIPPED:
                self._diverged(phase, f"{MAX_SKIPPED} steps in a row have no")
            return
        self._skipped = 0
        self.loss_sum, self.weight_sum = self.loss_sum + loss_sum, self.weight_sum + weight_sum
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)

    def _diverged(self, phase: Phase, what: str) -> NoReturn:
        hint = f"Lower lr (it is {phase.lr:g}) or the clipping norm"
        raise UsageError(f"training diverged: {what} finite gradient", "fine-tuning", hint)

    # ------------------------------------------------------------------ validation

    def _validate(self, phase: str, lr: float) -> None:
        """Evaluate on "valid", write the history entry, keep the weights if they are the best so far."""
        if self.average is not None and self.history:
            with self.average.applied(self.model):
                self._judge(phase, lr)
        else:
            self._judge(phase, lr)
        self.loss_sum = self.weight_sum = 0.0

    def _judge(self, phase: str, lr: float) -> None:
        metrics: dict[str, float] = {}
        if self.processes.is_main:
            metrics = measure(self.task, self.model, "valid", known=not self.history)
        metrics = self.processes.from_main(metrics)
        with torch.no_grad():
            penalty = float(unitary_penalty(self.model))
        entry: dict[str, Any] = {
            "phase": phase,
            "epoch": self._epochs_done(),
            "step": self._steps_before() + self.step,
            "loss": self.loss_sum / self.weight_sum if self.weight_sum else None,
            "penalty": penalty,
            "lr": lr,
            "metrics": metrics,
        }
        if self.conditioning:
            found = measure_conditioning(self.model, self.task, self.recipe.seed) if self.processes.is_main else {}
            entry["conditioning"] = self.processes.from_main(found)
        self.history.append(entry)
        if self.logs is not None and self.processes.is_main:
            self.logs.write(self.history)
        if self.annealing is not None and not self.annealing.done:
            return  # a network whose overlays are still too large is nobody's best
        value = metrics[self.task.metric]
        if self.best is None or better(value, self.best["metrics"][self.task.metric], self.task.higher_is_better):
            state = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"metrics": metrics, "epoch": self._epochs_done(), "state": state}
            self.stale = 0
            if self.on_best is not None and self.processes.is_main:
                self.on_best(self.model, metrics)
        else:
            self.stale += 1

    # ------------------------------------------------------------------ the saved state

    def _outline(self) -> list[list[Any]]:
        return [[phase.name, phase.taught, phase.anneals and self.annealing is not None] for phase in self.phases]

    def _shapes(self) -> dict[str, list[int]]:
        """Of every parameter; of an overlay only the block, since the number of blocks falls while it is annealed."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        return {n: s[1:] if n.endswith("overlay.values") else s for n, s in shapes.items()}

    def _save_if_due(self) -> None:
        by_steps = self.recipe.save_steps and self.step % self.recipe.save_steps == 0
        if by_steps or time.monotonic() - self._saved_at > self.recipe.save_seconds:
            self._save()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.folder is None or not self.processes.is_main:
            return
        average = self.average
        save_state(
            self.folder,
            {
                "recipe": self.recipe.to_json(),
                "shapes": self._shapes(),
                "batches": [self.batches, self.group],
                "phases": self._outline(),
                **{name: getattr(self, name) for name in SAVED},
                "skipped": self._skipped,
                "seconds": self._seconds(),
                "model": self.model.state_dict(),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "average": None if average is None else {"updates": average.updates, "shadow": average.shadow},
            },
        )

    def _restore(self) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("the folder for the state of the run cannot be made", self.folder) from error
        saved = load_state(self.folder)
        self.processes.wait()  # the main process must not write before all have read
        if saved is None:
            return None
        check_same_run(self.folder, saved, self.recipe, self._shapes())
        if saved["batches"] != [self.batches, self.group]:
            raise UsageError("the task's batches or the number of processes changed since this run began", self.folder)
        if saved["phases"] != self._outline():
            raise UsageError(
                "the run in this folder had a teacher, or had none", self.folder, "Give the same --teacher"
            )
        for name in SAVED:
            setattr(self, name, saved[name])
        self._skipped, self.seconds_before = saved["skipped"], saved["seconds"]
        self._load(saved["model"])
        if self.recipe.ema:
            self.average = Average(self.model, self.recipe.ema)
            self.average.updates = saved["average"]["updates"]
            self.average.shadow = {n: t.to(self.processes.device) for n, t in saved["average"]["shadow"].items()}
        return saved

    def _load(self, state: dict[str, Tensor]) -> None:
        if self.annealing is not None:
            self.annealing.fit_shapes(state)
        self.model.load_state_dict(state)
        if self.annealing is not None:
            self.annealing.settle()

    # ------------------------------------------------------------------ where the run stands

    def _phase_steps(self, phase: Phase) -> int:
        return max(1, round(phase.epochs * self.steps_per_epoch))

    def _phase_epochs(self, phase: Phase) -> int:
        return math.ceil(self._phase_steps(phase) / self.steps_per_epoch)

    def _steps_before(self) -> int:
        return sum(self._phase_steps(p) for p in self.phases[: self.phase])

    def _epoch(self) -> int:
        """Number of the current epoch, from 0, over all phases."""
        return sum(self._phase_epochs(p) for p in self.phases[: self.phase]) + self.step // self.steps_per_epoch

    def _epochs_done(self) -> int:
        done = sum(self._phase_epochs(p) for p in self.phases[: self.phase])
        return done + math.ceil(self.step / self.steps_per_epoch)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._started

    def _report(self, phase: Phase, lr: float) -> None:
        if self.on_progress is None or not self.processes.is_main:
            return
        done, total = self._steps_before() + self.step, sum(self._phase_steps(p) for p in self.phases)
        seconds = self._seconds()
        if self._paced is None:  # what came before it, the first validation for one, says nothing about the pace
            self._paced = (done, seconds)
        paced, since = self._paced
        last = self.history[-1] if self.history else None
        mean = self.loss_sum / self.weight_sum if self.weight_sum else (last or {}).get("loss")
        self.on_progress(
            Progress(
                phase=phase.name,
                epoch=max(1, self._epochs_done()),
                epochs=sum(self._phase_epochs(p) for p in self.phases),
                step=done,
                steps=total,
                loss=math.nan if mean is None else mean,
                lr=lr,
                seconds=seconds,
                remaining=(seconds - since) / (done - paced) * (total - done) if done > paced else None,
                metrics=dict(last["metrics"]) if last else {},
            )
        )


def better(value: float, than: float, higher_is_better: bool) -> bool:
    """Whether `value` is the better metric; nan is worse than everything."""
    if math.isnan(value):
        return False
    return math.isnan(than) or (value > than if higher_is_better else value < than)
