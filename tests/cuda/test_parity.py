"""Operators, launches and kernels of csrc/cuda against the float64 reference: on the shim, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from cases import (
    FIXED_SHAPES,
    GATES,
    KINDS,
    LOWER,
    PACKED,
    TOLERANCE,
    close,
    everything,
    inputs,
    low_rank,
    pair,
    parity,
    sums,
)

from kruify.errors import KruifyError
from kruify.ops import reference


@pytest.mark.parametrize(("kind", "shape", "batch"), all_pairs(kind=KINDS, shape=FIXED_SHAPES, batch=(1, 2)))
def test_fixed_shapes(device, matrix, kind, shape, batch) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, *shape)), kind, [batch] * 3, batch == 1, torch.float32, device)


@pytest.mark.parametrize(
    ("kind", "shape", "products"),
    # Rounding may take a ReLU over its kink; its template is that of tanh.
    all_pairs(kind=KINDS[:3], shape=FIXED_SHAPES, products=tuple(LOWER)),
)
def test_fixed_shapes_on_tensor_cores(device, matrix, kind, shape, products) -> None:  # type: ignore[no-untyped-def]
    sizes = [2, 1] if shape[0] < 64 else [1, 1]
    parity(matrix(*pair(kind, *shape)), kind, sizes, shape[0] == 32, torch.float32, device, products=products)


@pytest.mark.parametrize("products", LOWER)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_tensor_cores_with_other_shapes(device, matrix, kind, products) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 48, 16, 2), diagonal=(0,))
    parity(m, kind, PACKED, True, torch.float32, device, columns=10, products=products)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes(device, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, 12, 20, 2), diagonal=(0,)), kind, PACKED, False, torch.float32, device)


@pytest.mark.parametrize(("kind", "rank"), all_pairs(kind=KINDS, rank=(2, 3, 9)))
def test_ranks(device, matrix, kind, rank) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 16, 32, rank), diagonal=(0,) if rank == 3 else (), bias=rank != 2)
    parity(m, kind, PACKED, rank == 3, torch.float32, device, columns=10)


LOW_RANK = {  # hidden size, rank, more of the last gate, whether gates have their rows in common
    "own rows": (24, 5, 0, False),
    "common rows": (20, 3, 0, True),
    "one gate with more": (16, 8, 3, False),
    "common and own rows": (12, 4, 2, True),
    "as many as units": (8, 8, 0, True),
    "one": (4, 1, 0, False),
    "no fours": (6, 2, 0, True),
}


@pytest.mark.parametrize(("kind", "name", "batch"), all_pairs(kind=KINDS, name=tuple(LOW_RANK), batch=(1, 3, 5, 17)))
def test_low_rank(device, matrix, kind, name, batch) -> None:  # type: ignore[no-untyped-def]
    """Packed rows that end one by one, in groups of one, four, eight and sixteen."""
    hidden, rank, rest, shared = LOW_RANK[name]
    m = matrix(*low_rank(kind, hidden, rank, rest), diagonal=(0,), bias=batch != 3, shared=(0,) if shared else ())
    sizes = [batch, batch, (batch + 1) // 2, 1]
    parity(m, kind, sizes, batch == 5, torch.float32, device, columns=6 if batch == 1 else 0)


BESIDE = {  # beside low rank: a term of two stages or none, blocks of a sparse residual and their rows
    "a pair": ((8, 4), 0, 0),
    "a residual": (None, 60, 4),
    "single entries": (None, 90, 1),
    "both": ((12, 4), 30, 8),
    "far apart": (None, 2, 8),
}


@pytest.mark.parametrize(("kind", "name", "batch"), all_pairs(kind=KINDS[:4], name=tuple(BESIDE), batch=(1, 3, 5, 17)))
def test_sums_with_low_rank(device, matrix, kind, name, batch) -> None:  # type: ignore[no-untyped-def]
    shape, residual, block = BESIDE[name]
    arguments = sums(kind, *shape, 3) if shape else low_rank(kind, 20, 3)
    shared = (0,) if batch in (3, 17) else ()
    m = matrix(*arguments, diagonal=(0,), residual=residual, block=block, shared=shared, bias=batch != 3)
    parity(m, kind, [batch, batch, (batch + 1) // 2, 1], batch == 5, torch.float32, device)


@pytest.mark.parametrize("without", [(0,), (1,), (2,)], ids=str)
def test_missing_gradients_of_low_rank(device, matrix, without) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*low_rank("lstm", 12, 3)), "lstm", [2, 1], False, torch.float32, device, without=without)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_in_double_precision(device, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*low_rank(kind, 6, 2, 3), shared=(0,)), kind, PACKED, False, torch.float64, device, columns=3)


@pytest.mark.parametrize(
    ("kind", "reverse", "dtype"),
    all_pairs(kind=KINDS, reverse=(False, True), dtype=(torch.float32, torch.float64)),
)
def test_the_general_kernel_takes_everything(device, matrix, kind, reverse, dtype) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*everything(kind), diagonal=[GATES[kind] - 1], residual=30)
    parity(m, kind, PACKED, reverse, dtype, device, columns=6)


@pytest.mark.parametrize("kind", KINDS)
def test_more_terms_than_a_launch_holds(device, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    m = matrix(GATES[kind], 6, 6, [(range(GATES[kind]), 1, [(2, 2), (3, 3)])] * 17, residual=5, block=2)
    parity(m, kind, [2, 2], False, torch.float64, device)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_structures_too_large_for_shared_memory(device, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, 64, 64, 4)), kind, [1, 1], False, torch.float32, device)


def test_long_sequences(device, matrix) -> None:  # type: ignore[no-untyped-def]
    """Packed sequences of a thousand steps: starts are uploaded in several launches."""
    parity(matrix(*pair("lstm", 4, 4)), "lstm", [3] * 500 + [2] * 400 + [1] * 300, True, torch.float32, device)


@pytest.mark.parametrize("without", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_missing_gradients(device, matrix, kind, without) -> None:  # type: ignore[no-untyped-def]
    if kind == "gru" and without == (0, 1):
        pytest.skip("nothing is left to derive from")
    for shape, dtype in (((16, 16), torch.float32), ((3, 2), torch.float64)):
        parity(matrix(*pair(kind, *shape)), kind, [2, 1], False, dtype, device, without=without)


@pytest.mark.parametrize("size", [4, 3])
def test_nothing_to_do(device, matrix, size) -> None:  # type: ignore[no-untyped-def]
    """No steps keep the state; no samples and no rows give nothing."""
    m = matrix(*pair("lstm", size, size)).to(torch.float32)
    stages, *rest = m.arguments()
    matrix_of = ([s.to(device) for s in stages], *(t.to(device) if isinstance(t, torch.Tensor) else t for t in rest))
    none = torch.empty(0, dtype=torch.int64)
    for batch in (2, 0):
        h0, c0 = torch.randn(2, batch, size * size, device=device)
        x = torch.empty(0, 4 * size * size, device=device)
        out, h, c, workspace = torch.ops.kruify.recurrence_forward(
            x, None, None, none, h0, c0, *matrix_of, "lstm", False, True
        )
        assert out.shape[0] == workspace.shape[0] == 0 and torch.equal(h, h0) and torch.equal(c, c0)
        _, dh, dc, grads = torch.ops.kruify.recurrence_backward(
            None, h0, c0, out, workspace, none, h0, c0, *matrix_of, "lstm", False
        )
        assert torch.equal(dh, h0) and torch.equal(dc, c0) and all(not g.any() for g in grads)
    assert torch.ops.kruify.kron_matmul_forward(torch.empty(0, size * size, device=device), *matrix_of).shape[0] == 0


PRODUCTS = {
    "pair": (2, 48, 64, [((0, 1), 2, [(4, 8), (12, 8)])], {}),
    "square pair": (4, 256, 256, [(range(4), 1, [(16, 16), (16, 16)])], {}),
    "big pair": (1, 1024, 512, [((0,), 1, [(32, 16), (32, 32)])], {}),
    "some gates": (3, 16, 16, [((0, 2), 1, [(4, 4), (4, 4)])], {}),
    "sum": (2, 24, 12, [((0, 1), 2, [(2, 3), (3, 2), (4, 2)]), ((1,), 3, [(24, 1), (1, 12)]),
                        ((0, 1), 1, [(6, 4), (4, 3)])], {}),
    "all": (2, 16, 12, [((0, 1), 1, [(4, 4), (4, 3)])], {"diagonal": (1,), "residual": 20}),
    "low rank first": (1, 12, 12, [((0,), 4, [(1, 12), (12, 1)])], {}),
    "low rank": (4, 24, 12, [(range(4), 5, [(24, 1), (1, 12)])], {}),
    "common rows": (4, 12, 20, [(range(4), 5, [(12, 1), (1, 20)])], {"shared": (0,), "diagonal": (1,), "residual": 9}),
    "common and own rows": (3, 8, 8, [(range(3), 2, [(8, 1), (1, 8)]), ((1, 2), 3, [(8, 1), (1, 8)]),
                                      ((0, 2), 1, [(4, 4), (2, 2)])], {"shared": (0, 1)}),
    "nothing but a diagonal": (2, 5, 7, [], {"diagonal": (0, 1)}),
    "many gates": (8, 4, 4, [(range(8), 2, [(2, 2), (2, 2)])], {}),
    "one stage": (1, 5, 3, [((0,), 2, [(5, 3)])], {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "bias"),
    all_pairs(name=tuple(PRODUCTS), dtype=(torch.float32, torch.float64), bias=(False, True)),
)
def test_product(device, matrix, name, dtype, bias) -> None:  # type: ignore[no-untyped-def]
    gates, rows, cols, terms, extras = PRODUCTS[name]
    product_parity(matrix(gates, rows, cols, terms, bias=bias, **extras), 29 if rows < 1000 else 5, device, dtype)


@pytest.mark.parametrize("products", LOWER)
@pytest.mark.parametrize("shapes", [[(16, 32), (48, 16)], [(64, 64), (16, 16)], [(32, 64), (64, 32)]], ids=str)
def test_product_on_tensor_cores(device, matrix, shapes, products) -> None:  # type: ignore[no-untyped-def]
    """Tiles for every warp of a block, for several groups of rows, and two a warp; rows that fill no batch."""
    rows, cols = (shapes[0][k] * shapes[1][k] for k in (0, 1))
    product_parity(matrix(2, rows, cols, [((0, 1), 2, shapes)]), 13, device, torch.float32, products)


def product_parity(m, count, device, dtype, products=0) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(1, count, m.layout.cols, dtype=torch.float64)
    grad, results = torch.randn(1, count, m.layout.gates * m.layout.rows, dtype=torch.float64), []
    for where, kind in ((device, dtype), ("cpu", torch.float64)):
        leaves = [
            None if t is None else t.to(where, kind).requires_grad_()
            for t in (x, *m.stages, m.diagonal, m.residual, m.bias)
        ]
        x1, *stages, diagonal, residual, bias = leaves
        call = (x1, stages, diagonal, residual, m.index if m.index is None else m.index.to(where), bias)
        layout = m.layout.encode()
        function = reference.kron_matmul if results else torch.ops.kruify.kron_matmul
        y = function(*call, layout, *([] if results else [products]))
        results.append([y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(where, kind))])
    for k, (got, wanted) in enumerate(zip(*results, strict=True)):
        close(f"result {k}", got, wanted, LOWER.get(products, TOLERANCE[dtype]))


CHAINS = {
    "pairs of 2x2": (4, [(2, 2)] * 5, [2, 3]),
    "rectangular": (3, [(3, 1), (2, 5), (1, 4)], [3]),
    "one": (2, [(3, 4)], [1]),
    "many rows": (1, [(40, 2), (3, 30)], [2]),
    "as many as there may be": (1, [(2, 1), *[(1, 1)] * 45, (2, 3)], [47]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_merged_factors(device, name, dtype) -> None:  # type: ignore[no-untyped-def]
    gates, shapes, groups = CHAINS[name]
    factors = [torch.randn(gates, 2, *s, dtype=torch.float64).requires_grad_() for s in shapes]
    scale = torch.randn(gates, 2, dtype=torch.float64).requires_grad_()
    stages = reference.merge(factors, scale, groups)
    above = [torch.randn_like(s) for s in stages]
    expected = [*stages, *torch.autograd.grad(stages, [*factors, scale], above)]
    own, weight = [f.detach().to(device, dtype) for f in factors], scale.detach().to(device, dtype)
    found = torch.ops.kruify.merge(own, weight, groups)
    found += torch.ops.kruify.merge_backward([g.to(device, dtype) for g in above], own, weight, groups)
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        close(f"result {k}", got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    gates = GATES[kind]
    m = matrix(gates, 6, 6, [(range(gates), 2, [(2, 3), (3, 2)])], diagonal=(0,), residual=3, block=2).of_kind(kind)
    x, w, b, sizes, h0, c0 = inputs(m, kind, [3, 2], columns=4)
    tensors = [x, w, b, h0, c0, *m.stages, m.diagonal, m.residual, m.bias]
    leaves = [t.to(device).requires_grad_() for t in tensors if t is not None]

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(given)
        x, w, b, h0, c0, *stages, diagonal, residual, bias = (None if t is None else next(rest) for t in tensors)
        found = torch.ops.kruify.recurrence(
            *(x, w, b, sizes, h0, c0, stages, diagonal, residual, m.index.to(device), bias),
            *(m.layout.encode(), kind, True, True),
        )
        return found[: 3 if kind == "lstm" else 2]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_wrong_arguments_are_refused(device, matrix) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", 16, 16)).to(torch.float32)
    x, _, _, sizes, h0, c0 = inputs(m, "lstm", [2, 1], torch.float32)
    x, h0, c0, bias = (t.to(device) for t in (x, h0, c0, m.bias))
    stages, layout = [s.to(device) for s in m.stages], m.layout.encode()
    good = [x, None, None, sizes, h0, c0, stages, None, None, None, bias, layout, "lstm", False, False]
    torch.ops.kruify.recurrence_forward(*good)
    wrong = {
        0: [x.double(), x[:, :-1], x[:-1]],
        3: [torch.tensor([1, 2]), torch.tensor([2, 2]), torch.tensor([2, 0, 1]), sizes.int()],
        4: [h0[:1], *([h0.cpu()] if device == "cuda" else [])],
        5: [None, c0[:, :-1]],
        6: [stages[:1], [*stages, stages[0]], [stages[0][:, :, :-1], stages[1]]],
        11: [layout[:-1], [3, *layout[1:]]],
        12: ["gru", "transformer"],
    }
    for place, values in wrong.items():
        for value in values:
            with pytest.raises((RuntimeError, KruifyError)):
                torch.ops.kruify.recurrence_forward(*[value if k == place else g for k, g in enumerate(good)])
