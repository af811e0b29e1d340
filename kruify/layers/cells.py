"""KRURNNCell, KRULSTMCell, KRUGRUCell: torch.nn's cells with a Kronecker recurrent matrix, one time step per call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.layers import compiled, int8, kernel, reference
from kruify.layers.backend import Weights
from kruify.layers.base import GATES, Factors, build_weight, check_option
from kruify.layers.matrix import KroneckerMatrix, reset_like_torch
from kruify.layers.recurrent import check_device, not_a_tensor
from kruify.layers.storage import storage_of
from kruify.ops.functions import transformed
from kruify.ops.reference import State
from kruify.quantization import INTEGERS


class KRUCellBase(nn.Module):
    """Constructor and forward of torch.nn.LSTMCell / GRUCell / RNNCell, and their parameter names.

    Args:
        nonlinearity: of an RNN cell, "tanh" or "relu".
        factors, input_factors: as of the layers (kruify.layers.base).

    Raises:
        UsageError: a size, a spec or an option that the cell does not know.
    """

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
        check_option("nonlinearity", nonlinearity, ("tanh", "relu") if self.kind == "rnn" else ("tanh",), self)
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

    @property
    def kernel_kind(self) -> str:
        """The kind as the operators name it: a key of kruify.ops.reference.GATES."""
        return f"rnn_{self.nonlinearity}" if self.kind == "rnn" else self.kind

    def weights(self) -> Weights:
        """By the names weight_ih, weight_hh, bias_ih, bias_hh, weight_hr (None: cells do not project)."""
        found: Weights = {n: getattr(self, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        return {**found, "weight_hr": None}

    def weights_of_directions(self) -> list[Weights]:
        return [self.weights()]

    def recurrent_weights(self) -> list[KroneckerMatrix | Tensor]:
        return [self.weight_hh]

    def reset_parameters(self) -> None:
        """Dense weights and biases uniform in +-1/sqrt(hidden), as torch; factors orthogonal."""
        reset_like_torch(self, self.hidden_size)

    def _step(self, input: Tensor, state: State | None) -> State:
        if storage_of(self, "weight_hh") not in INTEGERS:
            streamed = compiled.stream(self, input, state)
            if streamed is not None:
                return streamed
        x, state = self.batched(input, state)
        new = None if torch.compiler.is_compiling() or transformed() else int8.run_step(self, x, state)
        if new is not None:
            pass
        elif kernel.serves(self.weight_hh, x, projected=False) and (torch.compiler.is_compiling() or not transformed()):
            new = compiled.run_step(self, x, state)
        else:
            new = reference.step_from_input(self.kernel_kind, self.weights(), x, state)
        return new if input.dim() == 2 else tuple(s.squeeze(0) for s in new)

    def batched(self, input: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Input (batch, features) and state, each (batch, size), zeros where there is none.

        Raises:
            UsageError: a shape does not fit the cell.
        """
        if not isinstance(input, Tensor):
            raise UsageError(*not_a_tensor(input, "a tensor", self))
        check_device(self, self.weight_ih, input)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise UsageError(
                f"expected input of shape (batch, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}",
                type(self).__name__,
            )
        x = input if input.dim() == 2 else input.unsqueeze(0)
        count, shape = 2 if self.kind == "lstm" else 1, (x.shape[0], self.hidden_size)
        if state is None:
            return x, (x.new_zeros(shape),) * count
        if not all(isinstance(s, Tensor) for s in state):
            raise UsageError("the state must be a tensor, of an LSTM the pair (h, c)", type(self).__name__)
        state = tuple(state) if input.dim() == 2 else tuple(s.unsqueeze(0) for s in state)
        if len(state) != count or any(s.shape != shape for s in state):
            raise UsageError(
                f"expected {count} state tensor(s) of shape {shape}, got {[tuple(s.shape) for s in state]}",
                type(self).__name__,
            )
        for s in state:
            check_device(self, s, x, "state")
        return x, state

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
