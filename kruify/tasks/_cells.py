"""Recurrent layers by name, so that a task's network can be built with any cell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kruify.errors import TaskError
from kruify.ops.reference import planar

CELLS = ("rnn", "lstm", "gru", "kru-rnn", "kru-lstm", "kru-gru", "kru", "kru-real")


def recurrent(
    cell: str, input_size: int, hidden_size: int, *, factors: str = "auto", start: str = "linear", **options: Any
) -> nn.Module:
    """Return a recurrent layer with nn.LSTM's interface: nn.RNN, nn.LSTM, nn.GRU, or a kru layer with `factors`.

    "kru" is the Kronecker Recurrent Unit as published, its state complex, "kru-real" the same with a real state, both
    begun as `start` says; the other kru cells are torch's with Kronecker recurrent matrices.

    `options` go to the constructor (num_layers, batch_first, dropout ...). TaskError for an unknown cell.
    """
    dense: dict[str, type[nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
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


def output_size(layer: Any) -> int:
    """Return the features of the layer's output: twice the hidden size where the state is complex."""
    return int(getattr(layer, "output_size", layer.hidden_size))


def last_output(state: Any) -> Tensor:
    """Return the last layer's output behind the last step (batch, features), of the state behind it.

    The same numbers as `outputs[:, -1]`, but derivatives then need no zeros for all the other steps.
    """
    return planar((state[0] if isinstance(state, tuple) else state)[-1])
