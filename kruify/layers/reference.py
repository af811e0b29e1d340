"""The readable path: a loop over time, one `Step` at a time, on packed data. It is the oracle of every kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kruify.layers.steps import State, Step


def run(
    step: Step,
    gates_x: Tensor,  # (sum of batch_sizes, gates * hidden)
    batch_sizes: Sequence[int],  # sequences still running at each step, descending
    state: State,  # each (batch_sizes[0], size)
    reverse: bool = False,
) -> tuple[Tensor, State]:  # outputs (sum of batch_sizes, size), final state
    """Runs one layer in one direction over packed sequences, sorted by descending length."""
    starts = [0]
    for size in batch_sizes:
        starts.append(starts[-1] + size)
    if not batch_sizes:
        return gates_x.new_zeros(0, state[0].shape[-1]), state
    outputs: list[Tensor] = [gates_x] * len(batch_sizes)
    if reverse:
        running = tuple(s[: batch_sizes[-1]] for s in state)
        for t in range(len(batch_sizes) - 1, -1, -1):
            have, size = running[0].shape[0], batch_sizes[t]
            if size > have:  # shorter sequences begin here
                running = tuple(torch.cat([r, s[have:size]]) for r, s in zip(running, state, strict=True))
            running = step(gates_x[starts[t] : starts[t + 1]], running)
            outputs[t] = running[0]
        return torch.cat(outputs), running
    running, finished = state, []
    for t, size in enumerate(batch_sizes):
        if size < running[0].shape[0]:  # shorter sequences ended at the step before
            finished.append(tuple(r[size:] for r in running))
            running = tuple(r[:size] for r in running)
        running = step(gates_x[starts[t] : starts[t + 1]], running)
        outputs[t] = running[0]
    finished.append(running)
    final = tuple(torch.cat(parts) for parts in zip(*reversed(finished), strict=True))
    return torch.cat(outputs), final
