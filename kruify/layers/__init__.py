"""Recurrent layers with Kronecker matrices, in torch.nn's interface."""

from kruify.layers.cells import KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.gru import KRUGRU
from kruify.layers.kru import KRU
from kruify.layers.linear import KroneckerEmbedding, KroneckerLinear
from kruify.layers.lstm import KRULSTM
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm, SparseResidual
from kruify.layers.rnn import KRURNN

__all__ = [
    "KRU",
    "KRUGRU",
    "KRULSTM",
    "KRURNN",
    "KRUGRUCell",
    "KRULSTMCell",
    "KRURNNCell",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "KroneckerMatrix",
    "KroneckerTerm",
    "SparseResidual",
]
