"""The network of a task with the numbers of a file in it.

A file that `kruify train` wrote says which of the task's networks it holds: cell, size, factors, layers. It says that
as data for the options of the task that the user names; it names nothing to run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from kruify.checkpoint import NETWORK, Checkpoint, limits
from kruify.checkpoint.file_bytes import to_text
from kruify.conversion.loading import load_into
from kruify.errors import CorruptError, FactorSpecError, TaskError
from kruify.tasks._cells import recurrent_numbers
from kruify.tasks.base import Task, fresh_model

OPTIONS: dict[str, type] = {"cell": str, "hidden": int, "factors": str, "layers": int}
"""The options of a task that decide on its network, and their types."""
BYTES = 8  # of a number


def network_of(task: Task) -> dict[str, Any]:
    """Return the options of `task` that decide on its network, as far as it has them."""
    return {name: getattr(task, name) for name, kind in OPTIONS.items() if isinstance(getattr(task, name, None), kind)}


def load_network(checkpoint: Checkpoint, task: Task) -> nn.Module:
    """The task's network with the numbers of the checkpoint in it, dense or converted or trained from scratch.

    Raises:
        CorruptError: the tensors do not fit the network, or the note on it is damaged.
        PlanError: the plan of a converted file does not fit it.
        TaskError: the file holds another network of the task, and the task has no such options.
    """
    model = fresh_model(as_noted(checkpoint, task))
    return load_into(model, checkpoint)


def as_noted(checkpoint: Checkpoint, task: Task) -> Task:
    """`task` with the options that the file notes; the task itself where it notes none."""
    options = _read(checkpoint)
    if not options:
        return task
    task = copy.copy(task)
    for name, value in options.items():
        if not hasattr(task, name):
            raise TaskError(
                f'the file holds a network with {name}={value}, and the task has no option "{name}"',
                where=type(task).__name__,
                hint="Name the task that it was trained on",
            )
        setattr(task, name, value)
    return task


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    damaged = CorruptError("its note on the network is damaged", checkpoint.path, "Train it again")
    try:
        options = json.loads(checkpoint.metadata.get(NETWORK, "{}"))
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(options, dict) or any(type(value) is not OPTIONS.get(key) for key, value in options.items()):
        raise damaged
    # The smallest network of a size has a tensor of that size; its matrices may be dense where the file has factors.
    largest = max((tensor.numel for tensor in checkpoint.tensors.lazy.values()), default=0)
    hidden, layers = options.get("hidden", 1), options.get("layers", 1)
    if not 0 < hidden <= largest or not 0 < layers <= len(checkpoint.tensors):
        raise damaged
    try:
        needed = layers * recurrent_numbers(str(options.get("cell", "")), hidden, options.get("factors", "auto"))
    except FactorSpecError:
        raise damaged from None
    if BYTES * needed > limits.RATIO * checkpoint.size + limits.SLACK:
        raise damaged
    return options


def dense_note(metadata: Mapping[str, str]) -> dict[str, str]:
    """The note on the network for a file in which its Kronecker matrices are dense; nothing where there is none."""
    options = json.loads(metadata.get(NETWORK, "{}"))
    cell = options.get("cell")
    if cell in ("kru-rnn", "kru-lstm", "kru-gru"):
        options = {**options, "cell": cell.removeprefix("kru-")}
    return {NETWORK: to_text(options)} if options else {}
