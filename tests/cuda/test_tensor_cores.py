"""Products on tensor cores, on the shim: its mma against a dense product, and what the templates round and what not."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cases import FIXED_SHAPES, TOLERANCE, pair, parity
from torch import Tensor

from kruify.ops.precision import BF16, FLOAT32, NAMES, TF32

BITS = {TF32: 10, BF16: 7}  # of the mantissa
LOWER = pytest.mark.parametrize("precision", [TF32, BF16], ids=lambda p: NAMES[p])


def words(shim: Any, precision: int, numbers: Tensor) -> Tensor:  # (..., n) float32 -> (..., words) int32
    """The numbers as the kernels keep them."""
    flat = numbers.contiguous()
    kept = torch.zeros(flat.numel() // (2 if precision == BF16 else 1), dtype=torch.int32)
    shim.library.shim_rounded(
        precision, ctypes.c_void_p(flat.data_ptr()), flat.numel(), ctypes.c_void_p(kept.data_ptr())
    )
    return kept.reshape(*numbers.shape[:-1], -1)


def rounded(precision: int, x: Tensor) -> Tensor:
    """Rounded to nearest by arithmetic on the numbers, in float64."""
    if precision == BF16:
        return x.bfloat16().double()
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2 ** (BITS[TF32] + 1)
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor() / 2 ** (BITS[TF32] + 1), exponent)


@LOWER
def test_rounding(shim, precision) -> None:  # type: ignore[no-untyped-def]
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,)), torch.tensor([0.0, 1.0, -1.0, 3e38])])
    halves = torch.cat([1 + (torch.arange(8) * 2 + 1) * 2.0 ** -(BITS[precision] + 1)] * 2)  # ties
    x = torch.cat([x, halves, -halves])
    found = words(shim, precision, x)
    wide = found.view(torch.float32) if precision == TF32 else found.view(torch.bfloat16)
    assert torch.equal(wide.double(), rounded(precision, x))
    special = torch.tensor([float("nan"), float("nan"), float("inf"), float("-inf")])
    found = words(shim, precision, special)
    wide = (found.view(torch.float32) if precision == TF32 else found.view(torch.bfloat16)).float()
    assert wide[:2].isnan().all() and torch.equal(wide[2:], special[2:])


def fragments(precision: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (16, 8 words) and B (8 columns, 8 words) as the lanes' registers, by the PTX ISA, where groupID = lane / 4 and
    threadID_in_group = lane % 4.

    mma.m16n8k8 for .tf32: a0 in row groupID, column threadID_in_group; a1: row + 8, a2: column + 4, a3: both. b0 in row
    threadID_in_group, column groupID; b1: row + 4.
    mma.m16n8k16 for .bf16: ai in row groupID for i < 2 || 4 <= i < 6, else + 8; column threadID_in_group * 2 + (i & 1),
    + 8 for i >= 4. bi in row threadID_in_group * 2 + (i & 1), + 8 for i >= 2; column groupID.
    """
    left, right = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        if precision == TF32:
            left[lane] = torch.stack(
                [a[group, thread], a[group + 8, thread], a[group, thread + 4], a[group + 8, thread + 4]]
            )
            right[lane] = torch.stack([b[group, thread], b[group, thread + 4]])
        else:
            halves_a, halves_b = a.view(torch.int16), b.view(torch.int16)
            own = torch.zeros(8, dtype=torch.int16)
            for i in range(8):
                row = group if i < 2 or 4 <= i < 6 else group + 8
                own[i] = halves_a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)]
            left[lane] = own.view(torch.int32)
            both = [halves_b[group, thread * 2 + (i & 1) + (8 if i >= 2 else 0)] for i in range(4)]
            right[lane] = torch.stack(both).view(torch.int32)
    return left, right


@LOWER
def test_the_emulated_mma_is_the_dense_product(shim, precision) -> None:  # type: ignore[no-untyped-def]
    depth = 8 if precision == TF32 else 16
    a, b, c = torch.randn(16, depth), torch.randn(8, depth), torch.randn(16, 8)
    left, right = fragments(precision, words(shim, precision, a), words(shim, precision, b))
    found = torch.full((16, 8), float("nan"))
    for lane in range(32):
        group, thread = divmod(lane, 4)
        # c0, c1: row groupID; c2, c3: row + 8; columns threadID_in_group * 2 + (i & 1).
        places = [(group + (8 if i >= 2 else 0), thread * 2 + (i & 1)) for i in range(4)]
        sums = torch.stack([c[p] for p in places])
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (left, right, sums)]
        shim.library.shim_mma_lane(precision, lane, *pointers)
        for place, value in zip(places, sums, strict=True):
            found[place] = value
    wanted = c.double() + rounded(precision, a) @ rounded(precision, b).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@LOWER
def test_numbers_of_few_bits_come_out_exactly(gpu, matrix, precision) -> None:  # type: ignore[no-untyped-def]
    """Small integers are rounded nowhere: one step of a ReLU equals the dense product to the last bit."""
    m = matrix(*pair("rnn_relu", 32, 16, 1), bias=False)
    m.stages[:] = [torch.randint(-1, 2, s.shape).double() for s in m.stages]
    h0, x = torch.randint(-1, 2, (2, 512)).double(), torch.randint(-3, 4, (2, 512)).double()
    dense = torch.kron(m.stages[0][0, 0], m.stages[1][0, 0])
    inner = (h0.reshape(2, 32, 16) @ m.stages[1][0, 0].T).abs().max()
    assert inner < 2 ** BITS[precision]
    call = (x.float(), None, None, torch.tensor([2]), h0.float(), None, *m.to(torch.float32).arguments(), "rnn_relu")
    out, *_ = torch.ops.kruify.recurrence_forward(*call, False, False, precision)
    assert gpu.tensor_products()
    assert torch.equal(out.double(), (x + h0 @ dense.T).relu())


@LOWER
def test_states_are_not_rounded(gpu, matrix, precision) -> None:  # type: ignore[no-untyped-def]
    """With factors of zero h and c are the gates' business alone: as exact as in float32."""
    m = matrix(*pair("gru", 16, 16, 1), bias=False)
    m.stages[:] = [torch.zeros_like(s) for s in m.stages]
    x, h0 = torch.randn(6, 768), torch.randn(2, 256)
    results = []
    for asked in (precision, FLOAT32):
        call = (x, None, None, torch.tensor([2, 2, 2]), h0, None, *m.to(torch.float32).arguments(), "gru", False)
        results.append(torch.ops.kruify.recurrence_forward(*call, False, asked))
        assert (gpu.tensor_products() > 0) == (asked != FLOAT32)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((12, 20), torch.float32), ((24, 16), torch.float32), ((16, 16), torch.float64)]
)
def test_what_tensor_cores_do_not_take_stays_as_it_is(gpu, matrix, shape, dtype) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", *shape))
    parity(m, "lstm", [2, 1], False, dtype, "cpu", products=BF16, allowed=TOLERANCE[dtype])
    assert gpu.tensor_products() == 0


def test_what_a_launch_takes(gpu) -> None:  # type: ignore[no-untyped-def]
    """Every fixed shape fits an H200 with multiprocessors for all of 64 rows; bf16 needs less shared memory than
    float32; what TF32 has no room for stays float32 where that fits."""
    for gates in (4, 3, 1):
        for shape in FIXED_SHAPES:
            for backward in (False, True):
                float32, bf16, tf32 = (gpu.plan(gates, *shape, 1, 64, backward, p) for p in (FLOAT32, BF16, TF32))
                for cluster, threads, tile, size, _ in (float32, bf16, tf32):
                    assert cluster >= 1
                    assert threads % 32 == 0 and threads <= 512 and tile in (2, 4) and size <= 232448
                assert bf16[4] == BF16 and (bf16[3] < float32[3] or bf16[0] < float32[0])
                # No lower precision at the price of a second turn of the whole chip.
                assert all(cluster * 64 <= 132 for cluster, *_ in (float32, bf16, tf32))
    exact = gpu.plan(3, 32, 32, 1, 64, False, FLOAT32, major=8)
    assert gpu.plan(3, 32, 32, 1, 64, False, TF32, major=8)[4] == TF32
    limited = gpu.plan(3, 32, 32, 1, 64, False, TF32, major=8, shared_memory=exact[3])
    assert limited == exact and exact[4] == FLOAT32
