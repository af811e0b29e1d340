"""KRURNN: torch.nn.RNN with Kronecker recurrent matrices."""

from __future__ import annotations

import torch

from kruify.errors import UsageError
from kruify.layers.base import Backend, Factors, KRUBase


class KRURNN(KRUBase):
    """torch.nn.RNN's interface, nonlinearity tanh or relu; the recurrent matrix is a sum of Kronecker products."""

    kind = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        factors: Factors = "auto",
        input_factors: str | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise UsageError(f"nonlinearity must be 'tanh' or 'relu', got '{nonlinearity}'", "KRURNN")
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            nonlinearity=nonlinearity,
            factors=factors,
            input_factors=input_factors,
            backend=backend,
            device=device,
            dtype=dtype,
        )
