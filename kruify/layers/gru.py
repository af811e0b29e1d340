"""KRUGRU: torch.nn.GRU with Kronecker recurrent matrices."""

from __future__ import annotations

import torch

from kruify.layers.base import Backend, Factors, KRUBase


class KRUGRU(KRUBase):
    """torch.nn.GRU's interface; each gate's recurrent matrix is a sum of Kronecker products. It has no proj_size."""

    kind = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
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
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            factors=factors,
            input_factors=input_factors,
            backend=backend,
            device=device,
            dtype=dtype,
        )
