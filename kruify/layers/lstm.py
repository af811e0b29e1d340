"""KRULSTM: torch.nn.LSTM with Kronecker recurrent matrices."""

from __future__ import annotations

from kruify.layers.base import KRUBase


class KRULSTM(KRUBase):
    """torch.nn.LSTM's interface; each gate's recurrent matrix is a sum of Kronecker products (KRU-LSTM, ICML 2018).

    Arguments, shapes and errors: `kruify.layers.base.KRUBase`.
    """

    kind = "lstm"
