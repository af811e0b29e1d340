"""Operator arguments at awkward sizes, for all tests of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kruify.ops import Layout, TermLayout, reference

GATES = reference.GATES
# hidden size, terms: (rank, gates or None for all, stage shapes)
MATRICES: dict[str, tuple[int, list[tuple[int, tuple[int, ...] | None, list[tuple[int, int]]]]]] = {
    "tiny": (6, [(2, None, [(3, 3), (2, 2)]), (2, (0,), [(6, 1), (1, 6)])]),
    "pair": (64, [(1, None, [(8, 8), (8, 8)])]),
    "chain": (64, [(2, None, [(4, 4), (4, 4), (4, 4)]), (3, None, [(64, 1), (1, 64)])]),
    "rectangular": (96, [(2, (0, 2), [(8, 6), (12, 16)]), (1, (1,), [(16, 12), (6, 8)])]),
    "50": (50, [(1, None, [(10, 10), (5, 5)])]),
    "257": (257, [(1, None, [(257, 257)])]),
    "256": (256, [(1, None, [(16, 16), (16, 16)])]),
    "dense": (40, [(2, None, [(40, 40)]), (2, None, [(5, 4), (2, 5), (4, 2)])]),
    "shared": (48, [(3, None, [(48, 1), (1, 48)]), (2, None, [(8, 6), (6, 8)]), (1, None, [(4, 3), (3, 4), (4, 4)])]),
    "row-column": (32, [(1, None, [(1, 32), (32, 1)])]),
    "overlay": (24, []),
}
BATCHES = [(4, 4, 2, 1), (1, 1, 1), (9, 9, 3, 0), ()]


def recurrence_arguments(
    kind: str,
    matrix: str,
    sizes: tuple[int, ...],
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
    projected: bool = False,
    extras: bool = True,
    batch: int = 2,
) -> list[Any]:
    """Arguments of torch.ops.kruify.recurrence. `projected`: x already is the gates."""
    gates, (hidden, shapes) = GATES[kind], MATRICES[matrix]

    def random(*size: int, scale: float = 0.5) -> Tensor:
        return (scale * torch.randn(*size, dtype=torch.float64)).to(dtype).requires_grad_()

    terms, stages = [], []
    for rank, chosen, factors in shapes:
        chosen = tuple(range(gates)) if chosen is None else tuple(g for g in chosen if g < gates) or (0,)
        terms.append(TermLayout(len(factors), chosen))
        for f, (p, q) in enumerate(factors):
            alone = matrix == "shared" and f == len(factors) - 1  # one trailing stage for all gates
            stages.append(random(1 if alone else len(chosen), rank, p, q, scale=(rank * q) ** -0.5))
    block = next(b for b in (8, 3, 2, 1) if hidden % b == 0)
    rows = torch.randint(0, gates * hidden // block, (20,)).sort().values * block
    index = torch.stack([rows, torch.randint(0, hidden, (20,))], dim=1).int()
    extras = extras or not shapes
    layout = Layout(gates, hidden, hidden, (gates - 1,) if extras else (), tuple(terms)).encode()
    bias = random(gates * hidden // (2 if kind == "rnn_modrelu_complex" else 1))
    if kind in reference.MODRELU:
        # Above 0 modReLU leaps at z = 0: float32 would not follow float64. test_modrelu_where_... has those.
        bias = bias.detach().abs().neg().requires_grad_()
    total, batch = sum(sizes), sizes[0] if sizes else batch
    return [
        random(total, gates * hidden if projected else 3),
        None if projected else random(gates * hidden, 3),
        random(gates * hidden) if extras else None,
        torch.tensor(sizes, dtype=torch.int64),
        random(batch, hidden),
        random(batch, hidden) if kind == "lstm" else None,
        stages,
        random(1, hidden) if extras else None,
        random(20, block) if extras else None,
        index if extras else None,
        bias if extras else None,
        layout,
        kind,
        reverse,
        True,
    ]


def differentiable(arguments: list[Any]) -> list[Tensor]:
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def cast(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    def one(a: Any) -> Any:
        if isinstance(a, list) and a and isinstance(a[0], Tensor):
            return [one(t) for t in a]
        return a.detach().to(dtype).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a

    return [one(a) for a in arguments]


def replace(arguments: list[Any], tensors: list[Tensor]) -> list[Any]:
    """The arguments with their differentiable tensors replaced, in the order of `differentiable`."""
    fresh = iter(tensors)

    def one(a: Any) -> Any:
        if isinstance(a, list):
            return [one(t) for t in a]
        return next(fresh) if isinstance(a, Tensor) and a.requires_grad else a

    return [one(a) for a in arguments]
