"""The templates on tensor cores, on the CPU: the emulated mma against a dense product, and every template with it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from phase_cases import FIXED_SHAPES, SIZES, check, compare, pair
from torch import Tensor

from kruify.ops import reference
from kruify.ops.precision import BF16, FLOAT32, NAMES, TF32

BITS = {TF32: 10, BF16: 7}  # of the mantissa
TOLERANCE = {TF32: 2e-3, BF16: 1.6e-2}  # of the largest value: some roundings of half a unit each
KINDS = ("lstm", "gru", "rnn_tanh")
KINKED = ("rnn_relu", "rnn_modrelu", "rnn_modrelu_complex")  # rounding may take them to the other side
LOWER = pytest.mark.parametrize("precision", [TF32, BF16], ids=lambda p: NAMES[p])


def words(phases: Any, precision: int, numbers: Tensor) -> Tensor:  # (..., n) float32 -> (..., words) int32
    """The numbers as the kernels keep them."""
    flat = numbers.contiguous()
    kept = torch.zeros(flat.numel() // (2 if precision == BF16 else 1), dtype=torch.int32)
    phases.library.rounded(precision, ctypes.c_void_p(flat.data_ptr()), flat.numel(), ctypes.c_void_p(kept.data_ptr()))
    return kept.reshape(*numbers.shape[:-1], -1)


def rounded(precision: int, x: Tensor) -> Tensor:
    """Rounded to nearest by arithmetic on the numbers, in float64."""
    if precision == BF16:
        return x.bfloat16().double()
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2 ** (BITS[TF32] + 1)
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor() / 2 ** (BITS[TF32] + 1), exponent)


@LOWER
def test_rounding(phases, precision) -> None:  # type: ignore[no-untyped-def]
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,)), torch.tensor([0.0, 1.0, -1.0, 3e38])])
    halves = torch.cat([1 + (torch.arange(8) * 2 + 1) * 2.0 ** -(BITS[precision] + 1)] * 2)  # ties
    x = torch.cat([x, halves, -halves])
    found = words(phases, precision, x)
    wide = found.view(torch.float32) if precision == TF32 else found.view(torch.bfloat16)
    assert torch.equal(wide.double(), rounded(precision, x))
    special = torch.tensor([float("nan"), float("nan"), float("inf"), float("-inf")])
    found = words(phases, precision, special)
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
def test_the_emulated_mma_is_the_dense_product(phases, precision) -> None:  # type: ignore[no-untyped-def]
    depth = 8 if precision == TF32 else 16
    a, b, c = torch.randn(16, depth), torch.randn(8, depth), torch.randn(16, 8)
    left, right = fragments(precision, words(phases, precision, a), words(phases, precision, b))
    found = torch.full((16, 8), float("nan"))
    for lane in range(32):
        group, thread = divmod(lane, 4)
        # c0, c1: row groupID; c2, c3: row + 8; columns threadID_in_group * 2 + (i & 1).
        places = [(group + (8 if i >= 2 else 0), thread * 2 + (i & 1)) for i in range(4)]
        sums = torch.stack([c[p] for p in places])
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (left, right, sums)]
        phases.library.mma_lane(precision, lane, *pointers)
        for place, value in zip(places, sums, strict=True):
            found[place] = value
    wanted = c.double() + rounded(precision, a) @ rounded(precision, b).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def parity(phases: Any, m: Any, kind: str, sizes: list[int], reverse: bool, o: Any) -> tuple[Any, ...]:
    """Forward and backward against the reference; both have to run on tensor cores, the factors' gradients, too."""
    allowed = {"rtol": TOLERANCE[o.precision], "atol": TOLERANCE[o.precision]}
    templates, results = check(phases, m, kind, sizes, reverse, torch.float32, o, tolerance=allowed)
    assert templates == 1 and phases.tensors == phases.templates == 1 + m.layout.gates
    assert phases.library.warps_agree()
    return tuple(results)


@pytest.mark.parametrize(
    ("kind", "shape", "precision"), all_pairs(kind=KINDS, shape=FIXED_SHAPES, precision=(TF32, BF16))
)
def test_templates(phases, matrix, options, kind, shape, precision) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, *shape, 1))
    parity(phases, m, kind, [2, 1, 1] if shape[0] < 64 else [1, 1], shape[0] == 32, options(precision=precision))


@LOWER
@pytest.mark.parametrize("kind", KINKED)
def test_cells_with_a_kink(phases, matrix, options, kind, precision) -> None:  # type: ignore[no-untyped-def]
    """Outputs, and gradients from the reference's outputs: both passes on the same side of every kink."""
    m = matrix(*pair(kind, 32, 32, 1), diagonal=(0,)).of_kind(kind)
    sizes, x, h0 = torch.tensor([2, 2, 1]), torch.randn(5, 1024).double(), torch.randn(2, 1024).double() / 2
    leaves = [t.clone().requires_grad_() for t in (x, h0, *m.stages, m.diagonal, m.bias)]
    x1, h1, *stages, diagonal, bias = leaves
    matrix_of_leaves = (stages, diagonal, None, None, bias, m.layout.encode())
    out, h, _, saved = reference.recurrence(x1, None, None, sizes, h1, None, *matrix_of_leaves, kind, False)
    above, last = torch.randn_like(out), torch.randn_like(h)
    wanted = torch.autograd.grad([out, h], leaves, [above, last])
    own, o = m.to(torch.float32), options(precision=precision)
    found = phases.recurrence(x.float(), sizes, h0.float(), None, own, kind, False, o)
    assert phases.tensors == 1
    allowed = {"rtol": TOLERANCE[precision], "atol": TOLERANCE[precision]}
    compare("out", found[0], out.detach(), allowed)
    compare("h", found[1], h.detach(), allowed)
    given = (above.float(), last.float(), None, out.detach().float(), saved.detach().float())
    gates, dh, _, rest = phases.recurrence_backward(*given, sizes, h0.float(), None, own, kind, False, o)
    assert phases.tensors == 2
    for k, (got, want) in enumerate(zip((gates, dh, *rest), wanted, strict=True)):
        compare(f"gradient {k}", got, want, allowed)


@LOWER
@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_ranks_and_a_diagonal(phases, matrix, options, kind, precision) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 48, 16, 2), diagonal=(0,))
    parity(phases, m, kind, SIZES["packed"], True, options(precision=precision))


@LOWER
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_clusters(phases, matrix, options, cluster, precision) -> None:  # type: ignore[no-untyped-def]
    for kind in ("lstm", "rnn_tanh"):
        m = matrix(*pair(kind, 16, 64, 1), diagonal=(0,))
        parity(phases, m, kind, [2, 1], False, options(cluster=cluster, precision=precision))


@LOWER
def test_no_race_within_a_phase(phases, matrix, options, precision) -> None:  # type: ignore[no-untyped-def]
    """Threads in any order within a phase give the same bits."""
    m = matrix(*pair("gru", 32, 32, 1))
    results = []
    for order in range(3):
        torch.manual_seed(1)
        results.append(parity(phases, m, "gru", [2, 1], False, options(order=order, cluster=2, precision=precision)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True) if a is not None)


@LOWER
def test_numbers_of_few_bits_come_out_exactly(phases, matrix, options, precision) -> None:  # type: ignore[no-untyped-def]
    """Small integers are rounded nowhere: one step of a ReLU equals the dense product to the last bit."""
    m = matrix(*pair("rnn_relu", 32, 16, 1), bias=False)
    m.stages[:] = [torch.randint(-1, 2, s.shape).double() for s in m.stages]
    h0, x = torch.randint(-1, 2, (2, 512)).double(), torch.randint(-3, 4, (2, 512)).double()
    dense = torch.kron(m.stages[0][0, 0], m.stages[1][0, 0])
    inner = (h0.reshape(2, 32, 16) @ m.stages[1][0, 0].T).abs().max()
    assert inner < 2 ** BITS[precision]
    arguments = (x.float(), torch.tensor([2]), h0.float(), None, m.to(torch.float32), "rnn_relu", False)
    out, *_ = phases.recurrence(*arguments, options(precision=precision))
    assert phases.tensors == 1
    assert torch.equal(out.double(), (x + h0 @ dense.T).relu())


@LOWER
def test_states_are_not_rounded(phases, matrix, options, precision) -> None:  # type: ignore[no-untyped-def]
    """With factors of zero h and c are the gates' business alone: as exact as in float32."""
    m = matrix(*pair("gru", 16, 16, 1), bias=False)
    m.stages[:] = [torch.zeros_like(s) for s in m.stages]
    x, h0 = torch.randn(6, 768), torch.randn(2, 256)
    results = []
    for asked in (precision, FLOAT32):
        own = m.to(torch.float32)
        out = phases.recurrence(x, torch.tensor([2, 2, 2]), h0, None, own, "gru", False, options(precision=asked))
        assert phases.tensors == (asked != FLOAT32)
        results.append(out)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@LOWER
@pytest.mark.parametrize("shapes", [[(16, 32), (48, 16)], [(64, 64), (16, 16)], [(32, 64), (64, 32)]], ids=str)
def test_the_bare_product_and_its_gradients(phases, matrix, options, shapes, precision) -> None:  # type: ignore[no-untyped-def]
    """Tiles for every warp of a block, for several groups of rows, and two a warp; rows that fill no batch."""
    rows, cols = (shapes[0][k] * shapes[1][k] for k in (0, 1))
    m = matrix(2, rows, cols, [((0, 1), 2, shapes)])
    x, grad = torch.randn(13, cols, dtype=torch.float64), torch.randn(13, 2 * rows, dtype=torch.float64)
    stages = [s.clone().requires_grad_() for s in m.stages]
    x.requires_grad_()
    y = reference.kron_matmul(x, stages, None, None, None, m.bias, m.layout.encode())
    wanted, results = [y, *torch.autograd.grad(y, [x, *stages], grad)], []
    for order in (0, 1):
        o = options(precision=precision, order=order)
        product = phases.kron_matmul(x.detach().float(), m.to(torch.float32), o)
        assert phases.tensors == 2
        grad_x, found = phases.kron_matmul_backward(grad.float(), x.detach().float(), m.to(torch.float32), o)
        assert phases.tensors == 4
        results.append([product, grad_x, *found[:2]])
        for got, want in zip(results[-1], wanted, strict=True):
            compare("result", got, want.detach(), {"rtol": TOLERANCE[precision], "atol": TOLERANCE[precision]})
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(12, 20), (8, 8), (24, 16)], ids=str)
def test_other_sizes_stay_float32(phases, matrix, options, shape) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", *shape, 1))
    templates, _ = check(phases, m, "lstm", [2, 1], False, torch.float32, options(precision=BF16))
    assert templates == 1 and phases.tensors == 0


def test_float64_and_the_general_kernel_know_no_precision(phases, matrix, options) -> None:  # type: ignore[no-untyped-def]
    check(phases, matrix(*pair("gru", 16, 16, 1)), "gru", [2, 1], False, torch.float64, options(precision=BF16))
    assert phases.tensors == phases.templates == 0


def test_what_a_launch_takes(phases, options) -> None:  # type: ignore[no-untyped-def]
    """bf16 needs less shared memory than float32; what TF32 has no room for stays float32 where that fits."""
    for kind in KINDS:
        for shape in FIXED_SHAPES:
            for backward in (False, True):
                float32 = phases.choice(kind, *shape, 1, 64, backward, options())
                bf16 = phases.choice(kind, *shape, 1, 64, backward, options(precision=BF16))
                assert bf16[0] >= 1 and bf16[4] == BF16 and bf16[1] % 32 == 0
                assert bf16[3] < float32[3] or bf16[0] < float32[0]
                cluster, _, _, size, precision = phases.choice(kind, *shape, 1, 64, backward, options(precision=TF32))
                assert cluster >= 1 and size <= 232448 and precision in (TF32, FLOAT32)
    exact = phases.choice("gru", 32, 32, 1, 64, False, options(clusters=0))
    assert phases.choice("gru", 32, 32, 1, 64, False, options(precision=TF32, clusters=0))[4] == TF32
    limited = options(precision=TF32, shared_memory=exact[3], clusters=0)
    assert phases.choice("gru", 32, 32, 1, 64, False, limited) == exact and exact[4] == FLOAT32
