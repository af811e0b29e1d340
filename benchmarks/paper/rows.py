"""What is trained: one `Row` is one network of one of the paper's tasks, trained once from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kruify.tasks.base import Task
from kruify.tasks.loader import load_task


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        key: its name on the command line and in runs.jsonl.
        table: the experiment that it belongs to, a key of TABLES.
        title: how the table calls it.
        task: name and options of the task, all but the network's.
        cell, hidden, factors: the network. `hidden` 0: as many units as give the total size of the row `like`.
        like: key of the row whose total size a control has.
        steps: optimiser steps of the whole run.
        recipe: further options of kruify.training.Recipe.
        rank: the smaller, the earlier it is trained.
    """

    key: str
    table: str
    title: str
    task: str
    cell: str
    hidden: int
    steps: int
    factors: str = "2x2"
    like: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    rank: int = 0


@dataclass(frozen=True)
class Table:
    """One experiment.

    Attributes:
        asks: what the network has to show, one sentence.
        target: whether a test metric is good enough; None where rows are compared with each other.
        published: others' figures for the same task: (who, figure, source). Nothing that is merely remembered.
    """

    title: str
    asks: str
    target: Callable[[float], bool] | None = None
    published: tuple[tuple[str, str, str], ...] = ()


ANTISYMMETRIC = "Chang, Chen, Haber & Chi, AntisymmetricRNN, ICLR 2019, table 1 (MNIST, pixels / permuted)"
DIGITS = tuple(
    (who, figure, ANTISYMMETRIC)
    for who, figure in (
        ("KRU, 11 K parameters", "96.4 / 94.5 %"),
        ("LSTM, 68 K", "97.3 / 92.6 %"),
        ("full-capacity uRNN, 270 K", "96.9 / 94.1 %"),
        ("full-capacity uRNN, 16 K", "92.8 / 92.1 %"),
    )
)


def memoryless(blanks: int) -> float:
    """Cross entropy per step, in bits, of a network that answers blanks and guesses: 10 log2(8) / (T + 20)."""
    return 30 / (blanks + 20)


TABLES = {
    "copy-1000": Table(
        "Copy memory, T = 1000",
        f"Under 1 % of the memory-less {memoryless(1000):.4f} bits per step.",
        lambda bits: bits < 0.01 * memoryless(1000),
    ),
    "copy-2000": Table(
        "Copy memory, T = 2000",
        f"Under 1 % of the memory-less {memoryless(2000):.4f} bits per step.",
        lambda bits: bits < 0.01 * memoryless(2000),
    ),
    "copy-200": Table(
        "Copy memory, T = 200: what the penalty does",
        f"Memory-less {memoryless(200):.3f} bits per step. One learning rate for all: the factors move freely.",
    ),
    "adding-200": Table("Adding, T = 200", "Under 0.001, memory-less 0.167.", lambda mse: mse < 0.001),
    "adding-750": Table("Adding, T = 750", "Under 0.001, memory-less 0.167.", lambda mse: mse < 0.001),
    "permuted": Table(
        "Permuted pixels, Fashion-MNIST",
        "KRU of about 11 K parameters within one point of an LSTM of 68 K. The published figures are of MNIST, not of"
        " Fashion-MNIST, which is harder: they say how the networks compare, not what to expect here.",
        published=DIGITS,
    ),
    "jsb": Table(
        "JSB chorales (music21's scores)",
        "NLL at or under the GRU's with about 10 K parameters in all. Not the classic split, so no published figure"
        " stands beside these.",
    ),
    "characters": Table("Characters, King James Bible", "Bits per character against an LSTM of equal total size."),
    "phonemes": Table("Framewise phonemes, espeak-ng", "KRU-LSTM against the dense LSTM."),
}

_COPY = "copy-memory:batch_size=20,train_examples=2000"
# Mixed lengths in training alone: at T steps from the beginning thresholds only learn to silence the state.
_ADDING = "adding:batch_size=20,train_examples=20000,start=small,shortest=10"
_SLOW = {"lr": 1e-3, "factor_lr": 0.05, "schedule": "cosine", "warmup": 0.05}
# A change of an angle of W counts T times over a sequence: what reads the state can follow only if W moves slowly.
_COPYING = {"lr": 3e-3, "factor_lr": 0.01, "schedule": "cosine", "warmup": 0.05}
# Thresholds of modReLU are what adding needs: they move as fast as the rest, W slowly.
_THRESHOLDS = {"lr": 6e-3, "factor_lr": 0.05, "modrelu_lr": 1.0, "schedule": "cosine", "warmup": 0.05}
# Over 750 steps W must stay closer to unitary: at 6e-3 and a penalty of 1e-2 40,000 steps diverged.
_LONGER = {**_THRESHOLDS, "lr": 4e-3}
_SAME = {"lr": 3e-3, "schedule": "cosine", "warmup": 0.05}
_PIXELS = "fashion-mnist-permuted:batch_size=32"
_FAST = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.05}
_JSB = "jsb:dropout=0.2"
_MOVING = {**_SLOW, "factor_lr": 1.0}  # W learns as fast as the rest, so that the penalty has something to do
_FREE = {"unitary_penalty": 0.0}
_PENALTY = {"unitary_penalty": 1e-2}

ROWS = [
    Row("copy-1000-kru", "copy-1000", "KRU, 2x2 complex", f"{_COPY},T=1000", "kru", 128, 600,
        recipe={**_COPYING, **_PENALTY}, rank=1),
    Row("copy-1000-lstm", "copy-1000", "LSTM of equal size", f"{_COPY},T=1000", "lstm", 0, 2000,
        like="copy-1000-kru", recipe=_COPYING, rank=5),
    Row("copy-1000-kru-free", "copy-1000", "KRU without penalty", f"{_COPY},T=1000", "kru", 128, 600,
        recipe={**_COPYING, **_FREE}, rank=6),
    Row("copy-200-kru", "copy-200", "KRU, 2x2 complex", f"{_COPY},T=200", "kru", 128, 800,
        recipe={**_SAME, **_PENALTY}, rank=5),
    Row("copy-200-kru-free", "copy-200", "KRU without penalty", f"{_COPY},T=200", "kru", 128, 800,
        recipe={**_SAME, **_FREE}, rank=5),
    Row("copy-2000-kru", "copy-2000", "KRU, 2x2 complex", f"{_COPY},T=2000", "kru", 128, 600,
        recipe={**_COPYING, "factor_lr": 0.001, **_PENALTY}, rank=9),
    Row("copy-2000-lstm", "copy-2000", "LSTM of equal size", f"{_COPY},T=2000", "lstm", 0, 2000,
        like="copy-2000-kru", recipe=_COPYING, rank=12),
    Row("adding-200-kru", "adding-200", "KRU, 2x2 complex", f"{_ADDING},T=200", "kru", 128, 20000,
        recipe={**_THRESHOLDS, **_PENALTY}, rank=2),
    Row("adding-200-lstm", "adding-200", "LSTM of equal size", f"{_ADDING},T=200", "lstm", 0, 20000,
        like="adding-200-kru", recipe=_THRESHOLDS, rank=7),
    Row("adding-750-kru", "adding-750", "KRU, 2x2 complex", f"{_ADDING},T=750", "kru", 128, 40000,
        recipe={**_LONGER, "unitary_penalty": 0.1}, rank=3),
    Row("adding-750-lstm", "adding-750", "LSTM of equal size", f"{_ADDING},T=750", "lstm", 0, 40000,
        like="adding-750-kru", recipe=_LONGER, rank=13),
    Row("jsb-kru", "jsb", "KRU, complex", _JSB, "kru", 28, 4800, factors="7x7,2x2,2x2",
        recipe={**_FAST, **_FREE}, rank=4),
    Row("jsb-kru-gru", "jsb", "KRU-GRU", _JSB, "kru-gru", 27, 4800, factors="9x9,3x3", recipe=_FAST, rank=4),
    # At the KRU's 1e-2 it stays at the unigrams' level for half its steps, at 3e-3 for all of 2,400.
    Row("jsb-gru", "jsb", "GRU of equal size", _JSB, "gru", 0, 4800, like="jsb-kru", recipe={**_FAST, "lr": 3e-2},
        rank=4),
    Row("jsb-gru-256", "jsb", "GRU 256", "jsb", "gru", 256, 1200, recipe={"lr": 4e-3}, rank=4),
    Row("permuted-kru", "permuted", "KRU, 2x2 complex", _PIXELS, "kru", 512, 17190,
        recipe={**_SLOW, **_PENALTY}, rank=8),
    Row("permuted-lstm", "permuted", "LSTM 128", _PIXELS, "lstm", 128, 17190, recipe=_SLOW, rank=10),
    Row("permuted-kru-free", "permuted", "KRU without penalty", _PIXELS, "kru", 512, 17190,
        recipe={**_SLOW, **_FREE}, rank=14),
    Row("permuted-kru-moving", "permuted", "KRU, W as fast as the rest", _PIXELS, "kru", 512, 17190,
        recipe={**_MOVING, **_PENALTY}, rank=14),
    Row("permuted-kru-moving-free", "permuted", "KRU, W as fast as the rest, without penalty", _PIXELS, "kru", 512,
        17190, recipe={**_MOVING, **_FREE}, rank=14),
    Row("characters-kru-lstm", "characters", "KRU-LSTM", "king-james", "kru-lstm", 256, 9000, factors="auto",
        recipe={"lr": 3e-3}, rank=11),
    Row("characters-lstm", "characters", "LSTM of equal size", "king-james", "lstm", 0, 9000,
        like="characters-kru-lstm", recipe={"lr": 3e-3}, rank=11),
    Row("phonemes-kru-lstm", "phonemes", "KRU-LSTM", "phonemes", "kru-lstm", 128, 600, factors="auto",
        recipe={"lr": 3e-3}, rank=15),
    Row("phonemes-lstm", "phonemes", "LSTM 128", "phonemes", "lstm", 128, 600, recipe={"lr": 3e-3}, rank=15),
]  # fmt: skip


def row_of(key: str) -> Row:
    for row in ROWS:
        if row.key == key:
            return row
    raise SystemExit(f"there is no row {key}; there are {', '.join(row.key for row in ROWS)}")


def task_of(row: Row) -> Task:
    """The task with the row's network; a control without a size gets the one nearest to its like's total."""
    if row.hidden:
        return load_task(row.task, cell=row.cell, hidden=row.hidden, factors=row.factors)
    wanted = size_of(task_of(row_of(row.like)))
    tasks = (load_task(row.task, cell=row.cell, hidden=hidden) for hidden in range(1, 2000))
    best = best_error = None
    for task in tasks:
        error = abs(size_of(task) - wanted)
        if best_error is not None and error > best_error:
            break
        best, best_error = task, error
    assert best is not None
    return best


def size_of(task: Task) -> int:
    """Real numbers that the task's network has."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in task.model().parameters())
