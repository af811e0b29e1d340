"""KRURNNCell, KRULSTMCell, KRUGRUCell: torch.nn's cells with a Kronecker recurrent matrix, one time step a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.layers import kernel
from kruify.layers.base import Factors, apply_weight, build_weight
from kruify.layers.matrix import KroneckerMatrix, reset_like_torch
from kruify.layers.steps import GATES, Matrix, State, make_step


class KRUCellBase(nn.Module):
    """Constructor and forward of torch.nn.LSTMCell / GRUCell / RNNCell, and their parameter names."""

    kind: str
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        factors: Factors = "auto",
        input_factors: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise UsageError("input_size and hidden_size must be at least 1", type(self).__name__)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.bias, self.nonlinearity = bias, nonlinearity
        gates = len(GATES[self.kind])
        ih_factors = input_factors if isinstance(factors, str) or input_factors else factors
        self.weight_ih = build_weight("weight_ih", gates, hidden_size, input_size, ih_factors, device, dtype)
        self.weight_hh = build_weight("weight_hh", gates, hidden_size, hidden_size, factors, device, dtype)
        for name in ("bias_ih", "bias_hh"):
            parameter = nn.Parameter(torch.empty(gates * hidden_size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Dense weights and biases uniform in +-1/sqrt(hidden), as torch; factors orthogonal."""
        reset_like_torch(self, self.hidden_size)

    def _step(self, input: Tensor, state: State | None) -> State:
        streamed = kernel.streaming_step(self, input, state)
        if streamed is not None:
            return streamed
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise UsageError(
                f"expected input of shape (batch, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}",
                type(self).__name__,
            )
        x = input if input.dim() == 2 else input.unsqueeze(0)
        count = 2 if self.kind == "lstm" else 1
        if state is None:
            state = (x.new_zeros(x.shape[0], self.hidden_size),) * count
        elif input.dim() == 1:
            state = tuple(s.unsqueeze(0) for s in state)
        if len(state) != count or any(s.shape != (x.shape[0], self.hidden_size) for s in state):
            raise UsageError(
                f"expected {count} state tensor(s) of shape {(x.shape[0], self.hidden_size)}, "
                f"got {[tuple(s.shape) for s in state]}",
                type(self).__name__,
            )
        new = self._batched_step(x, state)
        return new if input.dim() == 2 else tuple(s.squeeze(0) for s in new)

    def _batched_step(self, x: Tensor, state: State) -> State:
        """One step, x (batch, features), each state (batch, hidden)."""
        weight = self.weight_hh
        if kernel.serves(weight, x, projected=False):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            kind = f"rnn_{self.nonlinearity}" if self.kind == "rnn" else self.kind
            return kernel.run_step(self, {name: getattr(self, name) for name in names}, kind, x, state)
        matrix: Matrix = weight if isinstance(weight, KroneckerMatrix) else lambda h: nn.functional.linear(h, weight)
        gates_x = apply_weight(self.weight_ih, x, self.bias_ih)
        return make_step(self.kind, matrix, self.bias_hh, nonlinearity=self.nonlinearity)(gates_x, state)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}"


class KRULSTMCell(KRUCellBase):
    """torch.nn.LSTMCell with Kronecker recurrent matrices: (batch, features), (h, c) -> (h, c)."""

    kind = "lstm"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self._step(input, hx)
        return h, c


class KRUGRUCell(KRUCellBase):
    """torch.nn.GRUCell with Kronecker recurrent matrices: (batch, features), h -> h."""

    kind = "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, None if hx is None else (hx,))[0]


class KRURNNCell(KRUCellBase):
    """torch.nn.RNNCell with a Kronecker recurrent matrix, nonlinearity tanh or relu: (batch, features), h -> h."""

    kind = "rnn"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, None if hx is None else (hx,))[0]
