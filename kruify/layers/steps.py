"""One time step of each cell: the equations of torch.nn.RNN, LSTM and GRU, gate order included.

Every step takes the input's share of the gates already computed (`gates_x`, it batches over time) and multiplies the
state by the recurrent matrix, which may be a `KroneckerMatrix` or anything else that can be called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.errors import UsageError

Matrix = Callable[[Tensor], Tensor]  # (batch, cols) -> (batch, gates * rows)
State = tuple[Tensor, ...]  # (h,) or (h, c), each (batch, size)
Step = Callable[[Tensor, State], State]  # (gates_x (batch, gates * hidden), state) -> state; h is the step's output

GATES = {"rnn": ("h",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}


def rnn_step(gates_x: Tensor, state: State, matrix: Matrix, b_hh: Tensor | None, nonlinearity: str) -> State:
    """h' = phi(gates_x + W_hh h + b_hh), phi tanh or relu."""
    total = gates_x + _affine(state[0], matrix, b_hh)
    return (torch.relu(total) if nonlinearity == "relu" else torch.tanh(total),)


def lstm_step(gates_x: Tensor, state: State, matrix: Matrix, b_hh: Tensor | None, w_hr: Tensor | None = None) -> State:
    """i, f, g, o as in torch.nn.LSTM; with a projection h' = W_hr (o * tanh(c'))."""
    h, c = state
    i, f, g, o = (gates_x + _affine(h, matrix, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_step(gates_x: Tensor, state: State, matrix: Matrix, b_hh: Tensor | None) -> State:
    """r, z, n as in torch.nn.GRU: the reset gate acts after the recurrent matrix, on W_hn h + b_hn."""
    (h,) = state
    xr, xz, xn = gates_x.chunk(3, dim=-1)
    hr, hz, hn = _affine(h, matrix, b_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


def make_step(
    kind: str,
    matrix: Matrix,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Step:
    """The step of one layer and direction, its weights bound."""
    if kind == "lstm":
        return lambda gates_x, state: lstm_step(gates_x, state, matrix, b_hh, w_hr)
    if kind == "gru":
        return lambda gates_x, state: gru_step(gates_x, state, matrix, b_hh)
    if kind == "rnn":
        return lambda gates_x, state: rnn_step(gates_x, state, matrix, b_hh, nonlinearity)
    raise UsageError(f"unknown kind of recurrent layer '{kind}'", hint="Use 'rnn', 'lstm' or 'gru'")


def _affine(h: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    y = matrix(h)
    return y if bias is None else y + bias
