"""The rearrangement that turns 'nearest Kronecker product' into 'nearest product of vectors'.

Van Loan & Pitsianis, "Approximation with Kronecker Products" (1993); for more than two factors Batselier & Wong,
"A constructive arbitrary-degree Kronecker product decomposition of tensors" (2015).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kruify.factors import Shape


def rearrange(matrix: Tensor, factors: Sequence[Shape]) -> Tensor:
    """(prod P_f, prod Q_f) -> (P_0 Q_0, P_1 Q_1, ...), a bijection of the entries.

    W = W_0 (x) W_1 (x) ... becomes vec(W_0) o vec(W_1) o ..., with vec() reading a factor row by row; Frobenius
    distances stay what they are. A view where the layout allows it (two factors: a copy unless q_0 or p_1 is 1).
    """
    count = len(factors)
    modes = matrix.reshape([p for p, _ in factors] + [q for _, q in factors])
    pairs = [axis for f in range(count) for axis in (f, count + f)]
    return modes.permute(pairs).reshape([p * q for p, q in factors])


def restore(tensor: Tensor, factors: Sequence[Shape]) -> Tensor:
    """The inverse of `rearrange`: (P_0 Q_0, P_1 Q_1, ...) -> (prod P_f, prod Q_f)."""
    count = len(factors)
    modes = tensor.reshape([size for shape in factors for size in shape])
    rows = 1
    for p, _ in factors:
        rows *= p
    order = [2 * f for f in range(count)] + [2 * f + 1 for f in range(count)]
    return modes.permute(order).reshape(rows, -1)
