"""The soft unitary penalty of Kronecker Recurrent Units.

Jose, Cisse, Fleuret, "Kronecker Recurrent Units", ICML 2018, section 3.3: the product is unitary when every factor
is, so the penalty looks at the factors alone and costs O(sum P_f Q_f min(P_f, Q_f)) instead of O(N^3).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kruify.layers.matrix import KroneckerMatrix

STATELESS = re.compile(r"weight(_(ih|hr).*)?")
DEFAULT_WEIGHT = 1e-2  # lambda where the penalty is on by default


def recurrent_matrices(model: nn.Module) -> Iterator[tuple[str, KroneckerMatrix]]:
    """The (name, matrix) pairs that carry a state from step to step.

    Converted input weights (`weight_ih*`), projections (`weight_hr*`) and weights of linear layers are left out:
    nothing is multiplied by them repeatedly.
    """
    for name, module in model.named_modules():
        if isinstance(module, KroneckerMatrix) and not STATELESS.fullmatch(name.rpartition(".")[2]):
            yield name, module


def unitary_penalty(model: nn.Module) -> Tensor:
    """sum_f ||W_f^H W_f - I||_F^2 over all factors of all recurrent matrices; W_f W_f^H for factors wider than tall.

    Returns:
        A differentiable scalar (real also for complex factors), 0 for a model without Kronecker matrices. It is not yet
        multiplied by lambda.
    """
    # Factors of one shape are penalised in one batched product: a 2x2 spec has hundreds of tiny ones.
    by_shape: dict[tuple[int, int, torch.dtype], list[Tensor]] = defaultdict(list)
    for _, matrix in recurrent_matrices(model):
        for term in matrix.term_list():
            for factor in term.held()[0]:
                p, q = factor.shape[-2:]
                by_shape[p, q, factor.dtype].append(factor.reshape(-1, p, q))
    total: Tensor | None = None
    for (p, q, _), factors in by_shape.items():
        stacked = torch.cat(factors) if len(factors) > 1 else factors[0]
        gram = stacked.mH @ stacked if p >= q else stacked @ stacked.mH
        defect = gram - torch.eye(min(p, q), dtype=gram.dtype, device=gram.device)
        part = (defect * defect.conj()).real.sum() if defect.is_complex() else defect.square().sum()
        total = part if total is None else total + part
    if total is None:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=parameter.device if parameter is not None else None)
    return total


def default_penalty(model: nn.Module) -> float:
    """lambda for `model`: on where a plain RNN carries the state, off for LSTM and GRU, whose gates hold the gradient
    already."""
    plain = any(matrix.gates == 1 for _, matrix in recurrent_matrices(model))
    return DEFAULT_WEIGHT if plain else 0.0
