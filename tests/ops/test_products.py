"""merge and kron_matmul against torch.kron and dense matrices."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import MATRICES, recurrence_arguments
from torch import Tensor

from kruify.ops import Layout, TermLayout
from kruify.ops.stages import plan

OPS = torch.ops.kruify


def dense_term(stages: list[Tensor]) -> Tensor:  # (gates, rows, cols), by torch.kron alone
    gates, rank = stages[0].shape[:2]
    return torch.stack(
        [
            sum(functools.reduce(torch.kron, [s[g % len(s), r] for s in stages]) for r in range(rank))  # type: ignore[misc]
            for g in range(gates)
        ]
    )


def dense_matrix(arguments: list[object]) -> Tensor:
    """The (gates * rows, cols) weight of a case, built entry by entry."""
    stages, diagonal, overlay, index, _, layout = arguments[6:12]
    gates, rows, cols = layout[:3]  # type: ignore[index]
    dense = torch.zeros(gates, rows, cols, dtype=torch.float64)
    code, start = iter(layout[4 + layout[3] :]), 0  # type: ignore[index,arg-type]
    for _ in range(next(code)):
        count, chosen = next(code), [next(code) for _ in range(next(code))]
        dense[chosen] += dense_term([s.detach() for s in stages[start : start + count]])  # type: ignore[index]
        start += count
    if isinstance(diagonal, Tensor):
        dense[gates - 1] += torch.diag(diagonal[0].detach())
    flat = dense.reshape(gates * rows, cols)
    if isinstance(overlay, Tensor) and isinstance(index, Tensor):
        for values, (row, column) in zip(overlay.detach(), index.tolist(), strict=True):
            flat[row : row + len(values), column] += values
    return flat


@pytest.mark.parametrize("rows", [0, 1, 7, 40])
@pytest.mark.parametrize("matrix", MATRICES)
def test_kron_matmul_is_the_dense_product(matrix: str, rows: int) -> None:
    arguments = recurrence_arguments("lstm", matrix, (1,))
    dense, bias = dense_matrix(arguments), arguments[10]
    weights = arguments[6:12]
    x = torch.randn(rows, dense.shape[1], dtype=torch.float64, requires_grad=True)
    want = x @ dense.T + (0 if bias is None else bias)
    for operator in (OPS.kron_matmul, OPS.kron_matmul_forward):
        torch.testing.assert_close(operator(x, *weights), want)
    torch.testing.assert_close(
        OPS.kron_matmul(x.float(), *[_single(w) for w in weights]), want.float(), rtol=1e-5, atol=1e-5
    )
    upstream = torch.randn_like(want)
    (grad_x,) = torch.autograd.grad(want, [x], upstream)
    parameters = [*weights[0], *(w for w in (weights[1], weights[2], bias) if w is not None)]
    actual = torch.autograd.grad(OPS.kron_matmul(x, *weights), [x, *parameters], upstream)
    torch.testing.assert_close(actual[0], grad_x)
    # Every other gradient against a difference quotient along a random direction.
    for parameter, grad in zip(parameters, actual[1:], strict=True):
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            up = OPS.kron_matmul(x, *weights)
            parameter -= 2 * step * direction
            down = OPS.kron_matmul(x, *weights)
            parameter += step * direction
        numeric = ((up - down) * upstream).sum() / (2 * step)
        torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


def test_a_sparse_residual_without_blocks() -> None:
    stage, bias = torch.randn(1, 1, 4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    values, index = torch.empty(0, 2, requires_grad=True), torch.empty(0, 2, dtype=torch.int32)
    x, upstream = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y = OPS.kron_matmul(x, [stage], None, values, index, bias, Layout(1, 4, 4, (), (TermLayout(1, (0,)),)).encode())
    want = x @ stage[0, 0].T + bias
    torch.testing.assert_close(y, want)
    leaves = [x, stage, bias]
    wanted = torch.autograd.grad(want, leaves, upstream)
    *found, of_values = torch.autograd.grad(y, [*leaves, values], upstream)
    assert of_values.shape == values.shape
    for a, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, w)


def _single(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_single(v) for v in value]
    return value.detach().float() if isinstance(value, Tensor) and value.is_floating_point() else value


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@pytest.mark.usefixtures("compiled")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(shapes, min_size=1, max_size=3), min_size=1, max_size=3), st.booleans(), st.integers(1, 3))
def test_merge_is_kron(groups: list[list[tuple[int, int]]], scaled: bool, rank: int) -> None:
    factors = [torch.randn(2, rank, p, q, dtype=torch.float64, requires_grad=True) for g in groups for p, q in g]
    scale = torch.randn(2, rank, dtype=torch.float64, requires_grad=True) if scaled else None
    stages = OPS.merge(
        [f.detach() for f in factors], None if scale is None else scale.detach(), [len(g) for g in groups]
    )
    wanted, start = [], 0
    for k, group in enumerate(groups):
        part = factors[start : start + len(group)]
        start += len(group)
        rows = [
            torch.stack([functools.reduce(torch.kron, [f[g, r] for f in part]) for r in range(rank)]) for g in range(2)
        ]
        wanted.append(torch.stack(rows) * (1 if scale is None or k else scale[..., None, None]))
    inputs = factors + ([] if scale is None else [scale])
    upstream = [torch.randn_like(w) for w in wanted]
    for a, w in zip(stages, wanted, strict=True):
        torch.testing.assert_close(a, w)
    found = OPS.merge_backward(upstream, inputs[: len(factors)], scale, [len(g) for g in groups])
    for a, w in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(a, w)


def test_second_derivatives_and_opcheck() -> None:
    factors = [torch.randn(1, 2, p, q, dtype=torch.float64, requires_grad=True) for p, q in [(2, 2), (1, 3), (2, 1)]]
    scale = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.merge, ([f.detach() for f in factors], scale.detach(), [2, 1]))
    arguments = recurrence_arguments("gru", "tiny", (1,))[6:12]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.kron_matmul, (x, *arguments))
    stages = arguments[0]
    assert torch.autograd.gradgradcheck(
        lambda x, *s: OPS.kron_matmul(x, list(s), *arguments[1:]), [x, *stages], fast_mode=True
    )


def test_plan_merges_what_is_tiny_and_keeps_what_is_good() -> None:
    assert len(plan(((2, 2),) * 10, 4).groups) <= 3
    assert plan(((32, 32), (32, 32)), 4).groups == (1, 1)
    assert plan(((512, 1), (1, 512)), 8).groups == (1, 1)
    assert plan(((1, 512), (512, 1)), 8).order == (1, 0)
    assert plan(((257, 257),), 4).groups == (1,)


def test_layout_survives_encoding() -> None:
    from kruify.ops.layout import decode

    layout = Layout(3, 4, 5, (0, 2), (TermLayout(2, (0, 1)), TermLayout(1, (2,))))
    assert decode(layout.encode()) == layout
