"""KRUGRU: torch.nn.GRU with Kronecker recurrent matrices."""

from __future__ import annotations

from kruify.layers.base import KRUBase


class KRUGRU(KRUBase):
    """torch.nn.GRU's interface; each gate's recurrent matrix is a sum of Kronecker products. It has no proj_size.

    Arguments, shapes and errors: `kruify.layers.base.KRUBase`.
    """

    kind = "gru"
