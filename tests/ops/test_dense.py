"""The compiled plain weight against the reference: its product with the identity, in float64."""

from __future__ import annotations

from dataclasses import replace as replace_field
from typing import Any

import pytest
import torch
from ops_cases import MATRICES, cast, differentiable, recurrence_arguments, replace
from torch import Tensor

from kruify.layers import KRULSTM, dense
from kruify.ops import Layout, TermLayout, reference
from kruify.ops.dense import form_dense
from kruify.ops.functions import unmerged
from kruify.ops.recurrence import run_recurrence

OPERATOR = torch.ops.kruify.dense


def weight(stages: list[Tensor], diagonal: Any, overlay: Any, index: Any, layout: list[int]) -> Tensor:
    return form_dense(unmerged(layout), (diagonal, overlay, index), stages)


def arguments(matrix: str, extras: bool = True) -> list[Any]:
    stages, diagonal, overlay, index, _, layout = recurrence_arguments("lstm", matrix, (1,), extras=extras)[6:12]
    return [stages, diagonal, overlay, index, layout]


def oracle(stages: list[Tensor], diagonal: Any, overlay: Any, index: Any, layout: list[int]) -> Tensor:
    eye = torch.eye(layout[2], dtype=torch.float64)
    return reference.kron_matmul(eye, stages, diagonal, overlay, index, None, layout).mT


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("matrix", MATRICES)
def test_weight_and_gradients(matrix: str) -> None:
    wide = arguments(matrix, extras=matrix != "pair")
    want = oracle(*wide)
    upstream = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, differentiable(wide), upstream)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        narrow = cast(wide, dtype)
        dense = weight(*narrow)
        assert (dense.double() - want).norm() <= tolerance * want.norm()
        grads = torch.autograd.grad(dense, differentiable(narrow), upstream.to(dtype))
        for actual, wanted in zip(grads, want_grads, strict=True):
            assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.usefixtures("compiled")
def test_a_weight_too_large_to_count_is_refused_before_memory_is_asked_for() -> None:
    stages = [torch.zeros(1, 1, 1024, 1024) for _ in range(3)]
    layout = Layout(1, 1024**3, 1024**3, (), (TermLayout(3, (0,)),)).encode()
    with pytest.raises(RuntimeError, match="sizes overflow"):
        OPERATOR(stages, None, None, None, layout)


@pytest.mark.parametrize("matrix", ["tiny", "chain"])
def test_gradcheck_twice(matrix: str) -> None:
    given = arguments(matrix)
    run = lambda *t: weight(*replace(given, list(t)))  # noqa: E731
    assert torch.autograd.gradgradcheck(run, differentiable(given), fast_mode=True)


@pytest.mark.parametrize("matrix", ["tiny", "chain", "overlay"])
def test_opcheck(matrix: str) -> None:
    stages, *rest, layout = arguments(matrix)
    given = [None if t is None else t.detach() for t in rest]
    torch.library.opcheck(OPERATOR, ([s.detach() for s in stages], *given, layout))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}])
def test_torchs_lstm_in_one_node(options: dict[str, Any]) -> None:
    """Outputs, gradients and second derivatives through torch's kernel as through the loop."""
    torch.manual_seed(0)
    layer = KRULSTM(3, 16, factors="2x2+diag+sparse:5%", **options)
    x, state = torch.randn(4, 5, 3, requires_grad=True), None
    found = []
    for backend in ("dense", "reference"):
        layer.backend = backend  # type: ignore[assignment]
        out, state = layer(x)
        assert backend == "reference" or dense.uses_fused_autograd(layer, x)
        loss = out.square().sum() + state[0].sum() + (3 * state[1]).sum()
        first = torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), list(layer.parameters()))
        found.append([out, *state, *first, *second])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("matrix", ["pair", "chain", "tiny"])
def test_recurrence_on_the_formed_weight(kind: str, matrix: str) -> None:
    """With W formed first: what the factors themselves give, and derivatives twice."""
    given = recurrence_arguments(kind, matrix, (3, 3, 2, 1))
    first, (stages, diagonal, overlay, index, bias, layout) = given[:6], given[6:12]
    gates = layout[0]
    whole = Layout(gates, *layout[1:3], (), (TermLayout(1, tuple(range(gates))),)).encode()
    tensors, results = differentiable([*first, stages, diagonal, overlay, bias]), []
    for plain in (None, whole):
        form, rest = replace_field(unmerged(layout), whole=plain), (diagonal, overlay, index)
        out, h, c = run_recurrence(form, kind, False, 0, tuple(first), bias, rest, stages)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + h.sum() + c.sum()
        grads = torch.autograd.grad(loss, tensors, create_graph=True)
        again = torch.autograd.grad(grads[0].square().sum(), tensors, allow_unused=True, materialize_grads=True)
        results.append([out, h, c, *torch.autograd.grad(loss, tensors, retain_graph=True), *grads, *again])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)
