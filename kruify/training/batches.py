"""The batches of one epoch: one list per optimiser step, divided among the processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from kruify.errors import TaskError
from kruify.tasks.base import Task, check_batches
from kruify.training.randomness import derived_seed, seed_all
from kruify.training.recipe import Recipe

Batch = tuple[int, Any]  # (number of the batch in its epoch, batch)


def count_batches(task: Task, seed: int) -> int:
    """Batches in one epoch of "train".

    Raises:
        TaskError: there are none.
    """
    batches = train_batches(task, derived_seed(seed, "epoch", 0))
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if not count:
        raise TaskError('split "train" has no batches', where=type(task).__name__)
    return count


def steps_per_epoch(task: Task, recipe: Recipe) -> int:
    """Optimiser steps in one epoch of a run that has not begun: as many processes take part as torchrun has started."""
    return math.ceil(count_batches(task, recipe.seed) / (recipe.accumulate * int(os.environ.get("WORLD_SIZE", "1"))))


def steps_of_epoch(
    task: Task, seed: int, epoch: int, *, limit: int, per_step: int, skip: int, rank: int, processes: int
) -> Iterator[list[Batch]]:
    """For every optimiser step this process's share of its `per_step` consecutive batches; it is empty where the last
    step has too few for all.

    Args:
        limit: batches taken from the epoch at most.
        skip: steps left out at the start (a resumed run has done them).
    """
    batches = iter(train_batches(task, derived_seed(seed, "epoch", epoch)))

    def numbered() -> Iterator[Batch]:
        for number in range(limit):
            # A task may draw while it makes a batch; what it draws must not depend on what training drew before.
            seed_all(seed, "data", epoch, number)
            try:
                yield number, next(batches)
            except StopIteration:
                return

    stream = numbered()
    for _ in range(skip):
        if not list(islice(stream, per_step)):
            return
    while step := list(islice(stream, per_step)):
        yield step[rank::processes]


def train_batches(task: Task, seed: int) -> Iterable[Any]:
    """The task's batches of "train". Its seed has 31 bits: numpy and some samplers take no more."""
    return check_batches(task.batches("train", seed=seed % 2**31), task)
