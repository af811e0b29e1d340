"""What `compress` and `sweep` do with one network: make candidates, choose the one that recovers best and the rate at
which it does, train it.

The energy that a structure keeps tells how good it is before fine-tuning, not how well it learns. A network that moves
far from its teacher does better with few large parts (low rank), one that stays near it with single entries beside
them: on g2p-en and King James the ranking by energy is the same, the one after training is not (benchmarks/recovery).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kruify.checkpoint import Checkpoint, carried, make_folder
from kruify.checkpoint.file_bytes import to_text
from kruify.conversion import Conversion, convert
from kruify.conversion.beside import layers_beside, linear_layers
from kruify.conversion.budget import Searches, Slack, parse_budget, slack_of
from kruify.conversion.calibration import Moments, calibrate
from kruify.conversion.locate import RecurrentLayer, locate
from kruify.conversion.sensitivity import plan_by_loss
from kruify.conversion.size import FileSize
from kruify.conversion.staying_dense import without_dense
from kruify.conversion.storing import check_storage
from kruify.errors import UsageError
from kruify.progress import Progress, named
from kruify.search.candidates import (
    CLEAR_LEAD,
    EVERYTHING,
    HALVED,
    Candidate,
    CandidateResult,
    Choice,
    Selection,
    first_of_the_best,
    make_candidates,
    make_latency_candidates,
    make_size_candidates,
)
from kruify.search.workers import Ray, spread
from kruify.tasks.base import Task
from kruify.tasks.evaluation import Evaluations
from kruify.training import FinetuneResult, Recipe, finetune
from kruify.training.digest import fingerprint

TRIED = ("int8", "int4")  # dtypes of the candidates under a budget of bytes, if none is given
SHARE = 1 / 12  # of the epochs, for each candidate: a quarter cost g2p at 16x the file 1.7 points (benchmarks/recovery)
LOWER = 1 / 3  # of the recipe's rate, which the best candidate is tried at, too: g2p at 8x the file gains 2.1 points


class CandidateSearch:
    """One trained network, its task, and the options of the whole training that candidates are chosen for.

    Args:
        dense: the trained network; it is the teacher, and is left alone.
        share: of the recipe's epochs, for which each candidate is trained; 0 takes the first candidate untried.
        source: the file that holds `dense`, if one does: files made from it carry some of its metadata.
        seed: of everything random.
        dtype, keep: how the weights of the converted network are stored (kruify.quantize); None is the better one of
            `TRIED` under a budget of bytes, else as they are computed.
        selection: which matrices may be factored.
        log_dir: a folder for `history.csv` of every training, each in a folder of its own there.
        recipe: options of kruify.training.Recipe, such as epochs. With `lr` among them no other rate is tried.

    Attributes:
        layers: the recurrent layers of the network.
        rates: peak learning rates to try, the usual one first.
        settings: what may not differ between a job and its continuation (JobState).
        source: of the file: the metadata that is carried on, its sha256, bytes of its weights.

    Raises:
        UsageError: no recurrent layer, or a bad option.
    """

    def __init__(
        self,
        dense: nn.Module,
        task: Task,
        *,
        share: float = SHARE,
        source: Checkpoint | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        dtype: str | None = None,
        keep: Sequence[str] = (),
        selection: Selection = EVERYTHING,
        log_dir: str | os.PathLike[str] | None = None,
        **recipe: Any,
    ) -> None:
        check_storage(dtype, keep)
        if not 0 <= share <= 1:
            raise UsageError(f"candidates are trained for a share of the epochs between 0 and 1, got {share}")
        settings = Recipe().changed(seed=seed, **recipe).to_json()
        self.layers = locate(dense).layers
        if not self.layers:
            raise UsageError("there is no RNN, LSTM or GRU layer to convert", type(dense).__name__)
        self.dense, self.task, self.share, self.seed = dense, task, share, seed
        usual = float(settings["lr"])
        self.rates = [usual] if "lr" in recipe else [usual, LOWER * usual]
        self.tensors = dense.state_dict()
        self.settings: dict[str, Any] = {"model": fingerprint(self.tensors), "task": type(task).__name__}
        self.settings |= {"share": share, "recipe": settings, "rates": self.rates}
        self.settings |= {"dtype": dtype, "keep": sorted(keep) or None}
        for name, value in asdict(selection).items():
            self.settings[name] = (list(value) if isinstance(value, tuple) else value) or None
        self.dtype, self.keep = dtype, tuple(keep)
        self.source = None if source is None else (carried(source), source.sha256, source.weight_bytes)
        self.selection, self.progress = selection, progress
        self.evaluations = Evaluations(task, progress)
        self._log_dir = None if log_dir is None else make_folder(log_dir)
        self._epochs = float(settings["epochs"])
        self._training: dict[str, Any] = {"seed": seed, "device": device, **recipe}
        self._searches: Searches = {}  # several budgets have half of their fits in common

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of what the dense network's matrices are applied to, on the task."""
        linear = linear_layers(self.dense) if self.dtype in (None, "int4") else []
        names = {*(layer.name for layer in self.beside), *linear}
        return calibrate(self.dense, self.task, seed=self.seed, beside=names, progress=self.progress)

    @cached_property
    def beside(self) -> list[RecurrentLayer]:
        """Linear layers and embeddings, which a budget of bytes may factor, too."""
        return layers_beside(self.dense, self.task, self.seed)

    @cached_property
    def baseline(self) -> dict[str, float]:
        """The dense network's metrics on the validation split."""
        return self.evaluations.measure(self.dense, "valid", known=True)

    def candidates(self, budget: str) -> list[Candidate]:
        """The conversions of the network to try for a budget."""
        limits = parse_budget(budget)
        if limits.of_network and self.selection.input_factors is not None:
            what = "a size or a latency chooses the factors of the input matrices, too"
            raise UsageError(what, f"budget {budget}", "Leave the input factors out, or set them for some matrices")
        beside = self.beside if limits.of_file else []
        skip, overrides = without_dense([*self.layers, *beside], self.tensors, **self.selection.patterns())
        selection = replace(self.selection, skip=tuple(skip), overrides=overrides)
        options: dict[str, Any] = {"moments": self.moments, "searches": self._searches}
        options |= {"selection": selection, "progress": self.progress}
        if limits.of_file:
            planner = partial(plan_by_loss, dense=self.dense, task=self.task)
            files = [self.file(dtype) for dtype in ([self.dtype] if self.dtype else TRIED)]
            files = [replace(file, layers=[*file.layers, *beside]) for file in files]
            found = make_size_candidates(files, budget, planner=planner, first=not self.share, **options)
        elif limits.latency is not None:
            found = make_latency_candidates(self.file(self.dtype or "float32"), self.dtype, budget, **options)
        else:
            found = make_candidates(self.tensors, self.layers, budget, seed=self.seed, dtype=self.dtype, **options)
        return [replace(candidate, lr=self.rates[0]) for candidate in found]

    def file(self, dtype: str) -> FileSize:
        """The network, and how its files will be stored."""
        return FileSize(self.tensors, self.layers, dtype, self.keep, self.seed, *(self.source or ()))

    def convert(self, candidate: Candidate) -> tuple[nn.Module, Conversion]:
        return convert(
            self.dense, plan=candidate.plan, moments=candidate.moments, dtype=candidate.dtype, keep=self.keep,
            seed=self.seed,
        )  # fmt: skip

    def train(self, student: nn.Module, lr: float, state: Path | None, name: str, **changes: Any) -> FinetuneResult:
        """Fine-tunes `student` in place with the dense network as teacher, and goes on from what `state` holds.

        Args:
            lr: that of its candidate.
            name: what progress calls the training, and the folder of its log.
        """
        options = {**self._training, "lr": lr, **changes, "progress": named(self.progress, name)}
        if self._log_dir is not None:
            options["log_dir"] = self._log_dir / name.replace(" ", "-")
        return finetune(student, self.task, teacher=copy.deepcopy(self.dense), resume=state, **options)

    def notes(self, candidate: Candidate, outcome: FinetuneResult, budget: str) -> tuple[dict[str, str], list[Slack]]:
        """What a file says of its training, as far as a budget of bytes leaves room for it, and what the limits of the
        budget allow and the candidate takes with that."""
        history, recipe = outcome.to_json()["history"], {**self.settings["recipe"], "lr": candidate.lr}
        notes = {"kruify.history": to_text(history), "kruify.recipe": to_text(recipe)}
        slack = self._slack(candidate, budget, notes)
        if all(s.used <= s.allowed for s in slack if s.of == "bytes"):
            return notes, slack
        return {}, self._slack(candidate, budget, {})

    def _slack(self, candidate: Candidate, budget: str, notes: Mapping[str, str]) -> list[Slack]:
        """What the limits of a budget allow, and how much of it a candidate takes, in a file with these notes."""
        if not parse_budget(budget).of_file:
            return slack_of(candidate.plan, budget)
        assert candidate.dtype is not None
        file = self.file(candidate.dtype)
        return [Slack("bytes", file.limit(budget), replace(file, extra={**file.extra, **notes}).of(candidate.plan))]

    def choose(
        self,
        found: Sequence[Candidate],
        folder: Path | None = None,
        name: str = "",
        on_candidate: Callable[[CandidateResult], None] | None = None,
        ray: Ray = False,
    ) -> Choice:
        """The candidate that validates best after its short training, the first of those that come near it; then the
        rate at which that one does.

        Args:
            folder: for the states of the short trainings, which go on where they stopped.
            name: before their names in progress, and the folder of their logs.
            on_candidate: called after each of them.
            ray: where they run (search.workers).
        """
        if not self.trials(found):
            return Choice(found[0])
        sign, metric = -1 if self.task.higher_is_better else 1, self.task.metric
        candidates, results = list(found), dict[int, CandidateResult]()

        def best_of(places: Sequence[int], lead: float = CLEAR_LEAD) -> int:
            missing = [place for place in places if place not in results]
            job = partial(self._try, candidates, folder, name)
            for place, result in spread(job, missing, ray, self.task, self.progress):
                results[place] = result
                if on_candidate is not None:
                    on_candidate(result)
            losses = [sign * results[place].metrics[metric] for place in places]
            return places[first_of_the_best(losses, sign * self.baseline[metric], lead)]

        best = best_of(range(len(candidates)))
        candidates += [replace(found[best], lr=rate) for rate in self.rates[1:]]
        best = best_of([best, *range(len(found), len(candidates))], HALVED)
        return Choice(candidates[best], [results[place] for place in range(len(candidates))])

    def trials(self, found: Sequence[Candidate]) -> int:
        """How many short trainings `choose` takes."""
        count = len(found) + len(self.rates) - 1
        return count if self.share and count > 1 else 0

    def _try(self, found: Sequence[Candidate], folder: Path | None, name: str, place: int) -> CandidateResult:
        """The short training of one candidate."""
        candidate, label = found[place], f"candidate {place + 1}"
        state = None if folder is None else folder / label.replace(" ", "-")
        student, epochs = self.convert(candidate)[0], self._epochs * self.share
        student = self.train(student, candidate.lr, state, name + label, epochs=epochs, evaluate_first=False).model
        specs = dict.fromkeys(str(s) for _, _, structures in candidate.plan.matrices() for s in structures)
        return CandidateResult(list(specs), self.evaluations.measure(student, "valid"), candidate.lr, candidate.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which cannot tell this one how far it is."""
        return {**vars(self), "progress": None, "evaluations": Evaluations(self.task, None)}
