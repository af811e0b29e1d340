"""The batches of one epoch, in groups that one optimiser step takes, dealt out to the processes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

from kruify.errors import TaskError
from kruify.tasks.base import Task
from kruify.training.randomness import mix, seed_all

Batch = tuple[int, Any]  # (number of the batch in its epoch, batch)


def count_batches(task: Task, seed: int) -> int:
    """Batches in one epoch of "train".

    Raises:
        TaskError: there are none.
    """
    batches = task.batches("train", seed=mix(seed, "epoch", 0) % 2**31)
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if not count:
        raise TaskError('split "train" has no batches', where=type(task).__name__)
    return count


def groups(
    task: Task,
    seed: int,
    epoch: int,
    *,
    limit: int,
    size: int,
    skip: int,
    rank: int,
    processes: int,
) -> Iterator[list[Batch]]:
    """This process's share of each group of `size` consecutive batches; it is empty where the last group is too short
    for all.

    Args:
        limit: batches taken from the epoch at most.
        skip: groups left out at the start (a resumed run has done them).
    """
    # Task seeds are 31 bits: numpy and some samplers take no more.
    batches = iter(task.batches("train", seed=mix(seed, "epoch", epoch) % 2**31))

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
        if not list(islice(stream, size)):
            return
    while group := list(islice(stream, size)):
        yield group[rank::processes]
