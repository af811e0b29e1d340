"""How a recurrent matrix treats the state that it is multiplied with at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
