"""The compiled plain weight against the reference: its product with the identity, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import MATRICES, cast, differentiable, recurrence_arguments, replace
from torch import Tensor

from kruify.ops import functions, reference
from kruify.ops.layout import decode

OPERATOR = torch.ops.kruify.dense


def lean_dense(stages: list[Tensor], diagonal: Any, overlay: Any, index: Any, layout: list[int]) -> Tensor:
    terms = tuple((term.stages, None, False) for term in decode(layout).terms)
    return functions.dense(functions.Assembly(terms, layout), (diagonal, overlay, index), stages)


def arguments(matrix: str, extras: bool = True) -> list[Any]:
    stages, diagonal, overlay, index, _, layout = recurrence_arguments("lstm", matrix, (1,), extras=extras)[6:12]
    return [stages, diagonal, overlay, index, layout]


def oracle(stages: list[Tensor], diagonal: Any, overlay: Any, index: Any, layout: list[int]) -> Tensor:
    eye = torch.eye(layout[2], dtype=torch.float64)
    return reference.kron_matmul(eye, stages, diagonal, overlay, index, None, layout).mT


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_weight_and_gradients(matrix: str, lean: bool) -> None:
    wide = arguments(matrix, extras=matrix != "pair")
    want = oracle(*wide)
    upstream = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, differentiable(wide), upstream)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        narrow = cast(wide, dtype)
        dense = (lean_dense if lean else OPERATOR)(*narrow)
        assert (dense.double() - want).norm() <= tolerance * want.norm()
        grads = torch.autograd.grad(dense, differentiable(narrow), upstream.to(dtype))
        for actual, wanted in zip(grads, want_grads, strict=True):
            assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("matrix", ["tiny", "chain"])
def test_gradcheck_twice(matrix: str) -> None:
    given = arguments(matrix)
    run = lambda *t: lean_dense(*replace(given, list(t)))  # noqa: E731
    assert torch.autograd.gradgradcheck(run, differentiable(given), fast_mode=True)


@pytest.mark.parametrize("matrix", ["tiny", "chain", "overlay"])
def test_opcheck(matrix: str) -> None:
    torch.library.opcheck(OPERATOR, arguments(matrix))
