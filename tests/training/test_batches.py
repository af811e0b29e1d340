from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Delay

from kruify.errors import TaskError
from kruify.training.batches import count_batches, steps_of_epoch
from kruify.training.randomness import derived_seed, isolated_generators, seed_all


class Numbers(Delay):
    """Batches are numbers, drawn while they are made, in an order that follows from the seed."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Any]:
        order = random.Random(seed).sample(range(self.count), self.count)
        for number in order:
            yield number, float(torch.rand(())), random.random(), float(np.random.rand())


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), accumulate=st.integers(1, 3), processes=st.integers(1, 3), data=st.data())
def test_every_batch_goes_to_one_process(count: int, accumulate: int, processes: int, data: st.DataObject) -> None:
    task, size = Numbers(count), accumulate * processes
    steps = -(-count // size)
    skip = data.draw(st.integers(0, steps))

    def dealt(rank: int, processes: int, skip: int) -> list[list[Any]]:
        return list(steps_of_epoch(task, 3, 5, limit=count, per_step=size, skip=skip, rank=rank, processes=processes))

    with isolated_generators():
        alone = dealt(0, 1, 0)
        shared = [dealt(rank, processes, skip) for rank in range(processes)]
    assert sorted(batch[0] for group in alone for _, batch in group) == list(range(count))
    assert all(len(share) == steps - skip for share in shared)  # the same number of steps on every process
    for step in range(skip, steps):
        together = sorted(item for share in shared for item in share[step - skip])
        assert together == alone[step]  # the same batches, what was drawn for them included


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    task = Numbers(9)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        with isolated_generators():
            steps = steps_of_epoch(task, seed, epoch, limit=9, per_step=1, skip=0, rank=0, processes=1)
            return tuple(batch[0] for ((_, batch),) in steps)

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_counting() -> None:
    assert count_batches(Numbers(7), 0) == 7
    with pytest.raises(TaskError, match="no batches"):
        count_batches(Numbers(0), 0)


def test_limit_cuts_an_epoch_that_came_out_longer() -> None:
    with isolated_generators():
        steps = steps_of_epoch(Numbers(9), 0, 0, limit=5, per_step=2, skip=0, rank=0, processes=1)
        assert [len(group) for group in steps] == [2, 2, 1]


def test_seeds_cover_all_generators_and_isolation_puts_them_back() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    seed_all("a", 1)
    first = draw()
    seed_all("a", 2)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_all("a", 1)
    with isolated_generators():
        draw()
        seed_all("b")
    assert draw() == first
    assert derived_seed("a", 12) != derived_seed("a1", 2) and 0 <= derived_seed(0) < 2**63
