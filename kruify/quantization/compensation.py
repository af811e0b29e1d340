"""Four bits whose errors make up for each other: what rounding one column leaves out, the columns that are still exact
take up, as far as what the matrix is applied to lets them (GPTQ, Frantar et al. 2023; its base is OBS, Hassibi and
Stork 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.quantization.rows import dequantize, quantize_rows

DAMPING = 0.01  # of the mean of the moments' diagonal: what was seen tells little of directions that were hardly seen
BLOCK = 64  # columns whose errors are handed on together: a product of matrices in place of one for each column
ROWS = 2048  # rounded together: memory beyond the result is for these alone, and a block of columns stays in a cache


def compensated(weight: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """A matrix W rounded to four bits, Q, so that E||(W - Q) h||^2 is small, not ||W - Q||^2.

    Args:
        weight: (rows, cols), finite.
        second: (cols, cols), E[h h^T] of the vectors h that it is applied to, or their covariance.
        scale: of the integers of each row (rows, 1), or of each column (1, cols).

    Returns:
        float32 (rows, cols), scales times integers of `rows.LEVELS`.
    """
    weight, second, scale = weight.detach().cpu(), second.cpu().double(), scale.cpu()
    cols, mean = weight.shape[1], float(second.diagonal().mean())
    damped = second + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(cols, dtype=torch.float64)
    order = damped.diagonal().argsort(descending=True)  # the columns that count most while all others are exact
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    # Row i: how the columns after i take up an error of column i, once those before it are fixed.
    upper = torch.linalg.cholesky(inverse, upper=True)
    found = torch.empty(weight.shape, dtype=torch.float32)
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        left, own = (t[rows][:, order].T.contiguous() for t in (weight, scale.expand(weight.shape)))
        found[rows, order] = _columns_rounded(left.double(), own, upper).T
    return found


def _columns_rounded(left: Tensor, scale: Tensor, upper: Tensor) -> Tensor:
    """`compensated` of (cols, rows), its columns in the order of `upper`; overwrites `left`."""
    found = torch.empty_like(left, dtype=torch.float32)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            values, own = quantize_rows(left[at : at + 1], (0,), "int4", scale[at : at + 1])
            found[at] = dequantize(values, own)[0]
            errors[at - start] = (left[at] - found[at]) / upper[at, at]
            left[at + 1 : stop].addr_(upper[at, at + 1 : stop], errors[at - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return found
