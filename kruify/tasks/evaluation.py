"""Evaluations with progress. They are the task's own code, so what is counted are calls of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kruify.progress import Progress
from kruify.tasks.base import Task, measure


class Evaluations:
    """Evaluations of several networks on one task: the first on a split tells how many calls the others take."""

    def __init__(self, task: Task, progress: Progress | None) -> None:
        self.task, self.progress = task, progress
        self._calls: dict[str, int] = {}

    def measure(self, model: nn.Module, split: str, *, known: bool = False, name: str = "") -> dict[str, float]:
        """`tasks.base.measure`, which names the errors.

        Args:
            name: of the model, for progress.
        """
        if self.progress is None:
            return measure(self.task, model, split, known=known)
        phase = " ".join(filter(None, ("evaluating", name, "on", split)))
        with _counted(model, self.progress, phase, self._calls.get(split, 0)) as calls:
            found = measure(self.task, model, split, known=known)
        self._calls[split] = calls[0]
        return found


@contextmanager
def _counted(model: nn.Module, progress: Progress, phase: str, total: int) -> Iterator[list[int]]:
    """The number of calls of the network, or of that of its children that is called first: a task may call those."""
    calls, first = [0], list[nn.Module]()

    def count(module: nn.Module, arguments: Any) -> None:
        if not first:
            first.append(module)
        if module is first[0]:
            calls[0] += 1
            progress(calls[0], total, phase if total else f"{phase}: batch {calls[0]}")

    progress(0, total, phase)
    handles = [module.register_forward_pre_hook(count) for module in (model, *model.children())]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
