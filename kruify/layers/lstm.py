"""KRULSTM: torch.nn.LSTM with Kronecker recurrent matrices."""

from __future__ import annotations

import torch

from kruify.layers.base import Backend, Factors, KRUBase


class KRULSTM(KRUBase):
    """torch.nn.LSTM's interface; each gate's recurrent matrix is a sum of Kronecker products (KRU-LSTM, ICML 2018)."""

    kind = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        factors: Factors = "auto",
        input_factors: str | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            factors=factors,
            input_factors=input_factors,
            backend=backend,
            device=device,
            dtype=dtype,
        )
