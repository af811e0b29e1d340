"""Factors merged into stages, and what reaches a kernel of a sparse residual: the CUDA code on the CPU."""

from __future__ import annotations

import pytest
import torch
from phase_cases import FIXED_SHAPES, FP32, FP64, KINDS, compare, pair

from kruify.ops import reference
from kruify.ops.precision import BF16, FLOAT32, TF32

CHAINS = {
    "pairs of 2x2": (4, [(2, 2)] * 5),
    "rectangular": (3, [(3, 1), (2, 5), (1, 4)]),
    "one": (2, [(3, 4)]),
    "scaled": (6, [(2, 3), (4, 2), (1, 1)]),
    "many rows": (1, [(40, 2), (3, 30)]),
    "as many as there may be": (1, [(2, 1), *[(1, 1)] * 46, (2, 3)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_merged_factors_and_their_gradients(phases, options, name, dtype) -> None:  # type: ignore[no-untyped-def]
    pairs, shapes = CHAINS[name]
    factors = [torch.randn(pairs, *s, dtype=torch.float64).requires_grad_() for s in shapes]
    wanted = reference.merge([f[None] for f in factors], None, [len(factors)])[0][0]
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, factors, grad)
    tolerance = FP32 if dtype == torch.float32 else FP64
    own = [f.detach().to(dtype) for f in factors]
    for order in (0, 1):
        compare("stage", phases.merge(own, options(order=order)), wanted.detach(), tolerance)
        found = phases.merge_backward(grad.to(dtype), own, options(order=order))
        for k, (got, want) in enumerate(zip(found, expected, strict=True)):
            compare(f"gradient of factor {k}", got, want, tolerance)


@pytest.mark.parametrize(
    ("place", "message"),
    [((-1, 0), "outside"), ((70, 0), "outside"), ((64, 0), "outside"), ((17, 0), "outside"), ((0, -1), "outside"),
     ((0, 16), "outside"), ((48, 0), "ascend")],
)  # fmt: skip
def test_sparse_residuals_that_lead_out_of_the_matrix_are_refused(phases, matrix, options, place, message) -> None:  # type: ignore[no-untyped-def]
    m = matrix(4, 16, 16, [(range(4), 1, [(4, 4), (4, 4)])], residual=6, block=16).to(torch.float32)
    m.index[:, 0] = torch.tensor([0, 0, 16, 32, 48, 48])
    x = torch.randn(2, 16)
    phases.kron_matmul(x, m, options())
    m.index[2] = torch.tensor(place)
    with pytest.raises(RuntimeError, match=message):
        phases.kron_matmul(x, m, options())
    with pytest.raises(RuntimeError, match=message):
        sizes, h0 = torch.tensor([2]), torch.randn(2, 16)
        phases.recurrence(torch.randn(2, 64), sizes, h0, h0.clone(), m, "lstm", False, options())


def test_more_sparse_blocks_than_rows_are_checked_too(phases, matrix, options) -> None:  # type: ignore[no-untyped-def]
    m = matrix(1, 4, 4, [], diagonal=[0], residual=40, block=2).to(torch.float32)
    phases.kron_matmul(torch.randn(2, 4), m, options())
    m.index[-1] = torch.tensor([3, 0])
    with pytest.raises(RuntimeError, match="outside"):
        phases.kron_matmul(torch.randn(2, 4), m, options())


@pytest.mark.parametrize("precision", [FLOAT32, TF32, BF16])
@pytest.mark.parametrize("memory", [232448, 166912, 101376, 8192])
def test_the_limit_that_python_asks_for_is_that_of_the_launches(phases, matrix, options, memory, precision) -> None:  # type: ignore[no-untyped-def]
    for kind in KINDS:
        for shape in (*FIXED_SHAPES, (12, 20)):
            for rank in (1, 4):
                o = options(shared_memory=memory, clusters=int(memory == 232448), precision=precision)
                forward, backward = (phases.choice(kind, *shape, rank, 64, b, o)[0] > 0 for b in (False, True))
                found = [phases.fits(kind, *shape, rank, training, o) for training in (False, True)]
                assert found == [forward, forward and backward]
    assert not phases.fits("lstm", 3, 5, 1, False, options())


def test_what_does_not_fit_is_served_all_the_same(phases, matrix, options) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("gru", 32, 32, 4)).to(torch.float32)
    small = options(shared_memory=8192)
    assert not phases.fits("gru", 32, 32, 4, False, small)
    out, *_ = phases.recurrence(
        torch.randn(2, 3072), torch.tensor([2]), torch.zeros(2, 1024), None, m, "gru", False, small
    )
    assert phases.templates == 0 and out.isfinite().all()
