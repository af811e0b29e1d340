"""Recurrent layers with Kronecker matrices, in torch.nn's interface."""

from kruify.layers.cells import KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.gru import KRUGRU
from kruify.layers.lstm import KRULSTM
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm, Overlay
from kruify.layers.rnn import KRURNN

__all__ = [
    "KRUGRU",
    "KRULSTM",
    "KRURNN",
    "KRUGRUCell",
    "KRULSTMCell",
    "KRURNNCell",
    "KroneckerMatrix",
    "KroneckerTerm",
    "Overlay",
]
