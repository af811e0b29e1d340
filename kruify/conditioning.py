"""How a recurrent matrix treats the state that it is multiplied with at every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.layers.matrix import KroneckerMatrix


@dataclass(frozen=True)
class Conditioning:
    """Singular values of one matrix and what follows from them.

    Attributes:
        condition_number: largest over smallest singular value (infinite for a singular matrix).
        spectral_norm: largest singular value.
        unitarity_defect: ||W^H W - I||_F / sqrt(N), 0 for an orthogonal or unitary matrix.
        singular_values: all of them, descending.
    """

    condition_number: float
    spectral_norm: float
    unitarity_defect: float
    singular_values: tuple[float, ...]


def conditioning(
    matrix: Tensor,  # (rows, cols), float64 or complex128
) -> Conditioning:
    """The conditioning of one dense matrix. One with NaN or infinite entries has NaN for everything."""
    if not bool(torch.isfinite(matrix).all()):
        nan = float("nan")
        return Conditioning(nan, nan, nan, (nan,) * min(matrix.shape))
    singular = torch.linalg.svdvals(matrix.detach())
    largest, smallest = float(singular[0]), float(singular[-1])
    # A product of many roundings cannot tell a smaller singular value from 0.
    negligible = largest * max(matrix.shape) * torch.finfo(torch.float64).eps
    return Conditioning(
        condition_number=largest / smallest if smallest > negligible else float("inf"),
        spectral_norm=largest,
        unitarity_defect=float((singular.square() - 1).square().sum().sqrt()) / len(singular) ** 0.5,
        singular_values=tuple(singular.tolist()),
    )


@torch.no_grad()
def exact(weight: KroneckerMatrix | Tensor) -> Tensor:  # (gates * rows, cols)
    """The dense matrix that a weight stands for, worked out in float64 (complex128 for a complex one)."""
    if isinstance(weight, Tensor):
        return _double(weight.detach())
    double = copy.deepcopy(weight)
    for parameter in double.parameters():
        parameter.data = _double(parameter.data)
    return double.to_dense()


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
