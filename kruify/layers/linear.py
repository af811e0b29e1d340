"""`KroneckerLinear` and `KroneckerEmbedding`: nn.Linear and nn.Embedding with a sum of Kronecker products as weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.factors import Structure
from kruify.layers.computed import parameter
from kruify.layers.matrix import KroneckerMatrix, apply_weight


class KroneckerLinear(nn.Module):
    """y = W x + b as nn.Linear computes it: (..., in_features) -> (..., out_features).

    Args:
        structures: the one of W, (out_features, in_features).

    Attributes:
        weight: the `KroneckerMatrix`; `bias`: (out_features,), or None.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = KroneckerMatrix(structures, device, dtype)
        self.out_features, self.in_features = self.weight.shape
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        bias, low_rank = parameter(self, "bias"), _low_rank(self.weight)
        if low_rank is None:
            return apply_weight(self.weight, x, bias)
        left, right = low_rank
        return F.linear(F.linear(x, right), left, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class KroneckerEmbedding(nn.Module):
    """Rows of W as nn.Embedding gives them: integers (...) -> (..., embedding_dim).

    Args:
        structures: the one of W, (num_embeddings, embedding_dim).
        padding_idx: the row that is not trained.

    Attributes:
        weight: the `KroneckerMatrix`.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = KroneckerMatrix(structures, device, dtype)
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        low_rank = _low_rank(self.weight)
        if low_rank is None:
            return F.embedding(indices, self.weight.to_dense(), self.padding_idx)
        left, right = low_rank
        return F.embedding(indices, left, self.padding_idx) @ right

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


def _low_rank(weight: KroneckerMatrix) -> tuple[Tensor, Tensor] | None:
    """L (rows, rank) and R (rank, cols) of W = L R; None where W has another structure."""
    (structure, *others) = weight.structures
    shapes = [term.factors for term in structure.terms]
    beside = structure.scaled or structure.diagonal or structure.sparse_blocks
    if others or beside or shapes != [((structure.rows, 1), (1, structure.cols))]:
        return None
    left, right = weight.term_list()[0].held()[0]  # (1, rank, rows, 1), (1, rank, 1, cols)
    return left[0, :, :, 0].T, right[0, :, 0]
