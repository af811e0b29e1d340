"""The template of every fixed shape and the general kernels, by phases on the CPU, against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from all_pairs import all_pairs
from phase_cases import FIXED_SHAPES, FP32, FP64, KINDS, SIZES, check, compare, pair

from kruify.ops import reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FIXED_SHAPES, ids=str)
def test_every_fixed_shape(phases, matrix, options, kind, shape) -> None:  # type: ignore[no-untyped-def]
    cluster = 2 if shape[1] == 64 else 1
    m = matrix(*pair(kind, *shape, 1))
    for tile, reverse in ((2, False), (4, True)):
        templates, _ = check(
            phases,
            m,
            kind,
            SIZES["packed"] if tile == 2 else [1, 1],
            reverse,
            torch.float32,
            options(tile=tile, cluster=cluster),
        )
        assert templates == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks(phases, matrix, options, kind, rank) -> None:  # type: ignore[no-untyped-def]
    check(
        phases,
        matrix(*pair(kind, 16, 16, rank), bias=rank != 2),
        kind,
        SIZES["equal"],
        rank == 3,
        torch.float32,
        options(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters(phases, matrix, options, kind, cluster) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 16, 32, 1), diagonal=(0,))
    check(phases, m, kind, [2, 1], False, torch.float32, options(cluster=cluster))
    check(phases, m, kind, [1], True, torch.float32, options(cluster=cluster, tile=4, fixed=0))


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_run_the_same_code(phases, matrix, options, kind) -> None:  # type: ignore[no-untyped-def]
    templates, _ = check(
        phases, matrix(*pair(kind, 12, 20, 2), diagonal=(0,)), kind, SIZES["packed"], False, torch.float32, options()
    )
    assert templates == 1
    a = check(phases, matrix(*pair(kind, 32, 16, 1)), kind, [1, 1], False, torch.float32, options(fixed=0))
    assert a[0] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [1, 4])
def test_no_race_within_a_phase(phases, matrix, options, kind, cluster) -> None:  # type: ignore[no-untyped-def]
    """Threads in any order within a phase give the same bits."""
    m = matrix(*pair(kind, 16, 16, 2), diagonal=(0,))
    results = []
    for order in range(3):
        torch.manual_seed(1)
        results.append(
            check(phases, m, kind, SIZES["packed"], False, torch.float32, options(order=order, cluster=cluster))[1]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "reverse", "dtype"),
    all_pairs(kind=KINDS, reverse=(False, True), dtype=(torch.float32, torch.float64)),
)
def test_the_general_kernel_takes_everything(phases, matrix, options, kind, reverse, dtype) -> None:  # type: ignore[no-untyped-def]
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    terms = [
        (range(gates), 2, [(3, 3), (2, 2), (4, 4)]),
        ([gates - 1], 1, [(24, 24)]),
        (range(gates), 3, [(24, 1), (1, 24)]),
        ([0], 2, [(2, 3), (12, 8)]),
    ]
    m = matrix(gates, 24, 24, terms, diagonal=[gates - 1], residual=30)
    templates, first = check(phases, m, kind, SIZES["packed"], reverse, dtype, options())
    assert templates == 0
    torch.manual_seed(0)
    matrix(gates, 24, 24, terms, diagonal=[gates - 1], residual=30)
    torch.manual_seed(2)
    first = check(phases, m, kind, SIZES["packed"], reverse, dtype, options(order=2))[1]
    torch.manual_seed(2)
    second = check(phases, m, kind, SIZES["packed"], reverse, dtype, options(order=1))[1]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_more_terms_than_a_launch_holds(phases, matrix, options, kind) -> None:  # type: ignore[no-untyped-def]
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    terms = [(range(gates), 1, [(2, 2), (3, 3)])] * 17
    check(
        phases,
        matrix(gates, 6, 6, terms, diagonal=[0], residual=5, block=2),
        kind,
        SIZES["equal"],
        False,
        torch.float64,
        options(),
    )


def test_beyond_the_shared_memory_the_general_kernel_serves(phases, matrix, options) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", 16, 16, 2))
    templates, _ = check(phases, m, "lstm", [1, 1], False, torch.float32, options(shared_memory=8192))
    assert templates == 0


@pytest.mark.parametrize("without", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_missing_gradients(phases, matrix, options, kind, without) -> None:  # type: ignore[no-untyped-def]
    if kind == "gru" and without == (0, 1):
        pytest.skip("nothing is left to derive from")
    check(phases, matrix(*pair(kind, 16, 16, 1)), kind, [2, 1], False, torch.float32, options(), without)
    check(phases, matrix(*pair(kind, 3, 2, 1)), kind, [2, 1], False, torch.float64, options(), without)


@pytest.mark.parametrize("size", [4, 3])
def test_no_steps_keep_the_state(phases, matrix, options, size) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", size, size, 1)).to(torch.float32)
    h0, c0, none = torch.randn(2, size * size), torch.randn(2, size * size), torch.empty(0, dtype=torch.int64)
    out, h, c, workspace = phases.recurrence(torch.empty(0, 4 * size * size), none, h0, c0, m, "lstm", False, options())
    assert out.shape[0] == workspace.shape[0] == 0 and torch.equal(h, h0) and torch.equal(c, c0)
    _, dh, dc, rest = phases.recurrence_backward(
        None, h0, c0, out, workspace, none, h0, c0, m, "lstm", False, options()
    )
    assert torch.equal(dh, h0) and torch.equal(dc, c0) and all(not g.any() for g in rest)


PRODUCTS = {
    "pair": (2, 48, 64, [((0, 1), 2, [(4, 8), (12, 8)])], {}),
    "square pair": (4, 256, 256, [(range(4), 1, [(16, 16), (16, 16)])], {}),
    "big pair": (1, 1024, 512, [((0,), 1, [(32, 16), (32, 32)])], {}),
    "some gates": (3, 16, 16, [((0, 2), 1, [(4, 4), (4, 4)])], {}),
    "sum": (2, 24, 12, [((0, 1), 2, [(2, 3), (3, 2), (4, 2)]), ((1,), 3, [(24, 1), (1, 12)]),
                        ((0, 1), 1, [(6, 4), (4, 3)])], {}),
    "all": (2, 16, 12, [((0, 1), 1, [(4, 4), (4, 3)])], {"diagonal": (1,), "residual": 20}),
    "low rank first": (1, 12, 12, [((0,), 4, [(1, 12), (12, 1)])], {}),
    "nothing but a diagonal": (2, 5, 7, [], {"diagonal": (0, 1)}),
    "many gates": (8, 4, 4, [(range(8), 2, [(2, 2), (2, 2)])], {}),
    "one stage": (1, 5, 3, [((0,), 2, [(5, 3)])], {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "bias"),
    all_pairs(name=tuple(PRODUCTS), dtype=(torch.float32, torch.float64), bias=(False, True)),
)
def test_product(phases, matrix, options, name, dtype, bias) -> None:  # type: ignore[no-untyped-def]
    gates, rows, cols, terms, extras = PRODUCTS[name]
    m = matrix(gates, rows, cols, terms, bias=bias, **extras)
    for count in (1, 29) if rows < 1000 else (5,):
        x = torch.randn(count, cols, dtype=torch.float64)
        grad = torch.randn(count, gates * rows, dtype=torch.float64)
        leaves = [
            None if t is None else t.clone().requires_grad_() for t in (x, *m.stages, m.diagonal, m.residual, m.bias)
        ]
        x1, *stages, diagonal, residual, b = leaves
        y = reference.kron_matmul(x1, stages, diagonal, residual, m.index, b, m.layout.encode())
        expected = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
        tolerance, own, o = FP32 if dtype == torch.float32 else FP64, m.to(dtype), options(order=count % 2)
        compare("y", phases.kron_matmul(x.to(dtype), own, o), y.detach(), tolerance)
        assert (phases.templates > 0) == (dtype == torch.float32 and ("pair" in name or name == "some gates"))
        grad_x, rest = phases.kron_matmul_backward(grad.to(dtype), x.to(dtype), own, o)
        compare("grad_x", grad_x, expected[0], tolerance)
        for k, (got, want) in enumerate(zip(rest, expected[1:], strict=True)):
            compare(f"gradient {k}", got, want, tolerance)


def test_the_fixed_shapes_fit_an_h200_with_one_row_a_cluster(phases, options) -> None:  # type: ignore[no-untyped-def]
    for kind, shape, backward, batch in itertools.product(KINDS, FIXED_SHAPES, (False, True), (1, 64, 256)):
        cluster, threads, tile, size, _ = phases.choice(kind, *shape, 1, batch, backward, options())
        assert cluster >= 1 and size <= 232448 and threads % 32 == 0 and threads <= 512 and tile in (2, 4)
        assert batch != 64 or cluster * batch <= 132
