"""How far a long call is: the one type of callback that conversion, training, search, reporting and exporting take."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that is told how far a call is; a bar, a log line, a test that counts.

    Example:
        >>> kruify.convert("model.pt", budget="16x", progress=lambda done, total, phase: print(phase, done / total))
    """

    def __call__(self, done: float, total: float, phase: str, /) -> None:
        """Takes the units done and in all (matrices, batches, optimiser steps, bytes), 0 in all where that is unknown,
        and one line of text, such as "decomposing: rnn.weight_hh_l0" or "train epoch 2/5: training loss 0.312": what
        stands before its first colon names the phase."""


def named(progress: Progress | None, name: str) -> Progress | None:
    """`progress` with a name before each phase: "candidate 1/2, train epoch 1/2: training loss 0.312"."""
    return None if progress is None else lambda done, total, phase: progress(done, total, f"{name}, {phase}")
