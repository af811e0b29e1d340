"""KRURNN: torch.nn.RNN with Kronecker recurrent matrices."""

from __future__ import annotations

from typing import Any

from kruify.layers.base import KRUBase


class KRURNN(KRUBase):
    """torch.nn.RNN's interface, nonlinearity tanh or relu; the recurrent matrix is a sum of Kronecker products.

    Other arguments, shapes and errors: `kruify.layers.base.KRUBase`.
    """

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
        **options: Any,
    ) -> None:
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            nonlinearity=nonlinearity,
            **options,
        )
