"""copy-memory and adding: generated, so checked against their definitions step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kruify.errors import TaskError
from kruify.tasks.adding import Adding
from kruify.tasks.copy_memory import CopyMemory
from kruify.tasks.loader import load_task


class Fixed(nn.Module):
    """Answers the same whatever it reads."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(len(x), *self.answer.shape)


@pytest.mark.parametrize("T", [1, 2, 7, 100])
def test_copy_memory_sequences(T: int) -> None:
    task = CopyMemory(T=T, train_examples=5, batch_size=3)
    batches = list(task.batches("train", seed=4))
    assert [len(batch.x) for batch in batches] == [3, 2]
    for x, y, _ in batches:
        for inputs, outputs in zip(x.tolist(), y.tolist(), strict=True):
            symbols = inputs[:10]
            assert set(symbols) <= set(range(8))
            assert inputs[10:] == [8] * (T - 1) + [9] + [8] * 10
            assert outputs == [8] * (T + 10) + symbols


def test_copy_memory_chance_is_what_it_says() -> None:
    # The best answer without memory: blank for T + 10 steps, then each of the eight symbols alike.
    task = CopyMemory(T=20)
    logits = torch.full((40, 10), -40.0)
    logits[:30, 8] = 0.0
    logits[30:, :8] = 0.0
    logits[30:, 0] = 1e-4  # a symbol must win
    metrics = task.evaluate(Fixed(logits), "test")
    assert metrics["bits"] == pytest.approx(10 * math.log2(8) / 40, rel=1e-3)
    assert metrics["recall"] == pytest.approx(1 / 8, abs=0.01)


def test_copy_memory_of_an_oracle_is_solved() -> None:
    class Oracle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.full_like(x, 8)
            y[:, -10:] = x[:, :10]
            return 100.0 * nn.functional.one_hot(y, 10).float()

    metrics = CopyMemory(T=5).evaluate(Oracle(), "valid")
    assert metrics == {"bits": pytest.approx(0), "recall": pytest.approx(1)}


@pytest.mark.parametrize("T", [2, 3, 50])
def test_adding_sequences(T: int) -> None:
    task = Adding(T=T, train_examples=200, batch_size=128)
    first, second = set(), set()
    for x, y, _ in task.batches("train", seed=1):
        for (numbers, marks), total in zip(x.mT.tolist(), y[:, 0].tolist(), strict=True):
            assert sorted(marks, reverse=True)[:3] == [1.0, 1.0, 0.0][:T]
            a, b = (step for step, mark in enumerate(marks) if mark)
            assert a < T // 2 <= b
            assert total == pytest.approx(numbers[a] + numbers[b])
            assert all(0 <= number < 1 for number in numbers)
            first.add(a)
            second.add(b)
    if T == 3:
        assert (first, second) == ({0}, {1, 2})


def test_adding_of_mixed_lengths() -> None:
    task = Adding(T=6, shortest=4, train_examples=200, batch_size=5)
    lengths = [x.shape[1] for x, _, _ in task.batches("train", seed=1)]
    assert set(lengths) == {4, 5, 6}
    assert lengths == [x.shape[1] for x, _, _ in task.batches("train", seed=1)]
    for x, y, _ in task.batches("train", seed=1):
        torch.testing.assert_close((x[..., 0] * x[..., 1]).sum(1, keepdim=True), y)
        half = x.shape[1] // 2
        assert (x[:, :half, 1].sum(1) == 1).all() and (x[:, half:, 1].sum(1) == 1).all()
    assert {x.shape[1] for x, _, _ in task.batches("valid")} == {6}


@pytest.mark.parametrize("shortest", [1, 7, -2])
def test_adding_refuses_lengths_beyond_its_own(shortest: int) -> None:
    with pytest.raises(TaskError, match=f"shortest={shortest}"):
        Adding(T=6, shortest=shortest)


def test_adding_chance_is_what_it_says() -> None:
    assert Adding(T=10).evaluate(Fixed(torch.ones(1)), "test")["mse"] == pytest.approx(1 / 6, rel=0.03)


@pytest.mark.parametrize("name", ["copy-memory:T=3", "adding:T=4"])
def test_train_follows_the_seed_and_the_other_splits_stay(name: str) -> None:
    task = load_task(name)

    def first(split: str, seed: int) -> Tensor:
        return next(iter(task.batches(split, seed=seed))).x

    assert torch.equal(first("train", 1), first("train", 1))
    assert not torch.equal(first("train", 1), first("train", 2))
    assert torch.equal(first("valid", 1), first("valid", 2))
    assert not torch.equal(first("valid", 0)[:9], first("test", 0)[:9])
    assert sum(len(batch.x) for batch in task.batches("valid")) == task.examples("valid")


@pytest.mark.parametrize(("name", "told"), [("copy-memory:T=0", "T must be from 1"), ("adding:T=1", "T is at least 2")])
def test_too_short(name: str, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        load_task(name)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_adding_is_learnt(cell: str) -> None:
    torch.manual_seed(0)
    task = load_task("adding", T=4, cell=cell, hidden=24, train_examples=12_800)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for batch in task.batches("train"):
        optimizer.zero_grad()
        task.loss(task.forward(model, batch), batch).backward()
        optimizer.step()
    assert task.evaluate(model, "valid")["mse"] < 0.05  # chance: 0.167
