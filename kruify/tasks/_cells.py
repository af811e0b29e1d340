"""Recurrent layers by name, so that a task's network can be built with any cell."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from kruify.checkpoint.gates import GATES
from kruify.errors import TaskError, UsageError
from kruify.factors import parse, stacks
from kruify.ops.reference import planar

CELLS = ("rnn", "lstm", "gru", "kru-rnn", "kru-lstm", "kru-gru", "kru", "kru-real")

MOST_LAYERS = 1024


def recurrent(
    cell: str, input_size: int, hidden_size: int, *, factors: str = "auto", start: str = "linear", **options: Any
) -> nn.Module:
    """Return a recurrent layer with nn.LSTM's interface: nn.RNN, nn.LSTM, nn.GRU, or a kru layer with `factors`.

    "kru" is the Kronecker Recurrent Unit as published, its state complex, "kru-real" the same with a real state, both
    begun as `start` says; the other kru cells are torch's with Kronecker recurrent matrices.

    `options` go to the constructor (num_layers, batch_first, dropout ...).

    Raises:
        TaskError: there is no such cell. FactorSpecError: the factors do not fit.
        UsageError: the matrices take more than this machine's memory.
    """
    dense: dict[str, type[nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
    if (depth := options.get("num_layers", 1)) > MOST_LAYERS:
        raise UsageError(f"a network of {depth} layers is no use", hint=f"At most {MOST_LAYERS} are possible")
    numbers = depth * (hidden_size * input_size + recurrent_numbers(cell, hidden_size, factors))
    if 4 * numbers > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        what = f"a network of this size takes {4 * numbers >> 30:,} GiB, this machine has {memory >> 30:,}"
        raise UsageError(what, f"hidden size {hidden_size}", "Give a smaller one")
    if cell in dense:
        return dense[cell](input_size, hidden_size, **options)
    if cell not in CELLS:
        raise TaskError(f'there is no cell "{cell}"', hint=f"Cells are {', '.join(CELLS)}")
    from kruify import layers  # dense networks do not need it

    if cell in ("kru", "kru-real"):
        complex_state = cell == "kru"
        return layers.KRU(input_size, hidden_size, factors=factors, complex_state=complex_state, start=start, **options)
    kru: type[nn.Module] = getattr(layers, "KRU" + cell.removeprefix("kru-").upper())
    return kru(input_size, hidden_size, factors=factors, **options)


def recurrent_numbers(cell: str, hidden_size: int, factors: str) -> int:
    """Numbers in the recurrent matrices of a layer, at the most; FactorSpecError where the factors do not fit."""
    gates = GATES.get(cell.removeprefix("kru-"), 1 if cell.startswith("kru") else max(GATES.values()))
    if not cell.startswith("kru"):
        return gates * hidden_size**2
    stacked = gates if stacks(factors) else 1
    return gates // stacked * parse(factors).resolve(stacked * hidden_size, hidden_size, stacked).parameters


def output_size(layer: Any) -> int:
    """Return the features of the layer's output: twice the hidden size where the state is complex."""
    return int(getattr(layer, "output_size", layer.hidden_size))


def last_output(state: Any) -> Tensor:
    """Return the last layer's output behind the last step (batch, features), of the state behind it.

    The same numbers as `outputs[:, -1]`, but derivatives then need no zeros for all the other steps.
    """
    return planar((state[0] if isinstance(state, tuple) else state)[-1])
