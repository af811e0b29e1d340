"""What a CPU shows of the CUDA kernels and a GPU does not: threads in other orders, launches on other chips, places in
memory, and that every barrier is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

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
    run,
    sums,
)

from kruify.layers import kernel
from kruify.ops.precision import BF16, FLOAT32, NAMES, TF32

EVERYTHING = {"diagonal": [0], "residual": 12}


@pytest.mark.parametrize("case", ["template", "cluster", "general", "tf32", "bf16"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_modrelu_complex"])
def test_threads_in_any_order_give_the_same_bits(gpu, matrix, kind, case) -> None:  # type: ignore[no-untyped-def]
    """Ascending, descending and shuffled; in clusters blocks one by one or all at once."""
    if case == "general":
        m = matrix(*everything(kind), diagonal=[0], residual=30)
    else:
        m = matrix(*pair(kind, 32, 16, 2), diagonal=(0,))
    given, results = inputs(m, kind, PACKED), []
    for order in range(3):
        gpu.chip(processors=132 if case == "cluster" else 1, order=order)
        products = {"tf32": TF32, "bf16": BF16}.get(case, FLOAT32)
        results.append(run(m, kind, given, order == 3, "cpu", torch.float32, products))
        assert not any(t.isnan().any() for t in results[-1])
    clusters = {launch.cluster for launch in gpu.launches("PairForward", "PairBackward")}
    assert clusters == (set() if case == "general" else {4} if case == "cluster" else {1})
    assert (gpu.tensor_products() > 0) == (case in ("tf32", "bf16"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("kind", "cluster"), all_pairs(kind=KINDS, cluster=(1, 2, 4, 8)))
def test_every_cluster_size(gpu, matrix, kind, cluster) -> None:  # type: ignore[no-untyped-def]
    """As many blocks as leave every row multiprocessors of its own; the factors' products with few blocks, in turns."""
    gpu.chip(processors=cluster * 2)
    parity(matrix(*pair(kind, 32, 32), diagonal=(0,)), kind, [2, 1], cluster == 4, torch.float32, "cpu")
    launches = gpu.launches("PairForward", "PairBackward")
    assert [(launch.cluster, launch.blocks) for launch in launches] == [(cluster, 2 * cluster)] * 2


@pytest.mark.parametrize("products", LOWER, ids=lambda p: NAMES[p])
@pytest.mark.parametrize("cluster", [2, 4])
def test_clusters_with_tensor_cores(gpu, matrix, cluster, products) -> None:  # type: ignore[no-untyped-def]
    gpu.chip(processors=cluster * 2)
    for kind in ("lstm", "rnn_tanh"):
        m = matrix(*pair(kind, 16, 64), diagonal=(0,))
        parity(m, kind, [2, 1], False, torch.float32, "cpu", products=products)
        assert {launch.cluster for launch in gpu.launches("PairForward", "PairBackward")} == {cluster}
        assert gpu.tensor_products()


LOW_RANK = ("LowRankForward", "LowRankBackward")
MEMORY = {1: 60000, 2: 20000, 4: 10500, 8: 6500}  # of a block, where 64 units need a cluster of so many


@pytest.mark.parametrize(("kind", "cluster"), all_pairs(kind=KINDS[:3], cluster=tuple(MEMORY)))
def test_low_rank_in_every_cluster_size(gpu, matrix, kind, cluster) -> None:  # type: ignore[no-untyped-def]
    """The same bits with threads in any order."""
    m = matrix(*low_rank(kind, 64 if kind != "rnn_tanh" else 200, 8), diagonal=(0,))
    given, results = inputs(m, kind, [3, 2, 2]), []
    expected = run(m, kind, given, False, "reference", torch.float64)
    for order in range(3):
        gpu.chip(processors=cluster, shared_memory=MEMORY[cluster], order=order)
        results.append(run(m, kind, given, False, "cpu", torch.float32))
        assert {launch.cluster for launch in gpu.launches(*LOW_RANK)} == {cluster}
    for first, second, third, wanted in zip(*results, expected, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
        close("result", first, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("products", LOWER, ids=lambda p: NAMES[p])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_low_rank_on_tensor_cores(gpu, matrix, kind, products) -> None:  # type: ignore[no-untyped-def]
    """With more rows than blocks; the second group of sixteen is not full."""
    gpu.chip(processors=1)
    m = matrix(*low_rank(kind, 36, 33), diagonal=(0,), shared=(0,) if kind == "lstm" else ())
    parity(m, kind, [17, 16, 3], kind == "gru", torch.float32, "cpu", products=products)
    assert len(gpu.launches(*LOW_RANK)) == 2 and gpu.tensor_products()


SUMS = {1: 113500, 2: 65000, 4: 37000, 8: 25000}  # the same for 128 units as (32 x 32) (x) (4 x 4), 40 sparse blocks


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(("kind", "cluster"), all_pairs(kind=("lstm", "gru"), cluster=tuple(SUMS)))
def test_sums_in_every_cluster_size(gpu, matrix, kind, cluster, crowded) -> None:  # type: ignore[no-untyped-def]
    """The same bits with threads in any order; also where more blocks of the residual fall to one block of the cluster
    than it has room for."""
    m = matrix(*sums(kind, 32, 4, 8), diagonal=(0,), residual=40, block=8)
    if crowded:
        m.index[:, 0] = torch.arange(40) // 5
    given, results = inputs(m, kind, [3, 2, 2]), []
    expected = run(m, kind, given, False, "reference", torch.float64)
    for order in range(3):
        gpu.chip(processors=cluster, shared_memory=SUMS[cluster], order=order)
        results.append(run(m, kind, given, False, "cpu", torch.float32))
        assert [launch.cluster for launch in gpu.launches(*LOW_RANK)] == [cluster] * 2
    for first, second, third, wanted in zip(*results, expected, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
        close("result", first, wanted, TOLERANCE[torch.float32])


def test_sums_stay_in_float32(gpu, matrix) -> None:  # type: ignore[no-untyped-def]
    """Also where tensor cores are asked for; the gradients of the factors after the loop are not part of that."""
    gpu.chip(processors=1)
    m = matrix(*sums("lstm", 12, 4, 33), diagonal=(0,), residual=20, block=8, shared=(0,)).to(torch.float32)
    forward, _ = both_passes(m, "lstm", 17, TF32)
    gpu.launches(), gpu.tensor_products(), forward()
    assert len(gpu.launches(*LOW_RANK)) == 1 and not gpu.tensor_products()


STEPS = ("CellStep", "CellStepBackward")


@pytest.mark.parametrize(
    ("kind", "name", "reverse", "dtype"),
    all_pairs(kind=KINDS[:4], name=("low rank", "all"), reverse=(False, True), dtype=(torch.float32, torch.float64)),
)
def test_step_by_step(watched, matrix, kind, name, reverse, dtype) -> None:  # type: ignore[no-untyped-def]
    """What fits nowhere on the chip, with more rows than blocks; packed, a sample without steps at the end."""
    watched.chip(processors=1, shared_memory=1500)
    if name == "all":
        m, batch = matrix(*everything(kind), diagonal=[GATES[kind] - 1], residual=30), 48
    else:
        m, batch = matrix(*low_rank(kind, 12, 9), shared=(0,), diagonal=(0,)), 17
    parity(m, kind, [batch, batch, batch // 2, 1], reverse, dtype, "cpu")
    found = [launch.kernel.split("<")[0] for launch in watched.launches(*STEPS)]
    assert found == [STEPS[0]] * 4 + [STEPS[1]] * 4


@pytest.mark.parametrize("shape", FIXED_SHAPES, ids=str)
def test_a_fixed_shape_has_a_template_of_its_own(gpu, matrix, shape) -> None:  # type: ignore[no-untyped-def]
    """The shim is compiled with the first and the last of them; others run in the template for any shape."""
    parity(matrix(*pair("rnn_tanh", *shape)), "rnn_tanh", [1], False, torch.float32, "cpu")
    own = f"Square<{shape[0]}, {shape[1]}>" if shape in (FIXED_SHAPES[0], FIXED_SHAPES[-1]) else "AnyShape"
    assert [launch.kernel.split(", Pair")[0] for launch in gpu.launches("PairPlan")] == [own, own]


def test_beyond_the_shared_memory_the_general_kernel_serves(gpu, matrix) -> None:  # type: ignore[no-untyped-def]
    gpu.chip(shared_memory=8192, major=8)
    parity(matrix(*pair("gru", 16, 16, 2)), "gru", PACKED, False, torch.float32, "cpu")
    assert not gpu.launches("PairPlan", "PairProductPlan", "PairGradientPlan")


@pytest.mark.parametrize("precision", [FLOAT32, TF32, BF16], ids=lambda p: NAMES[p])
@pytest.mark.parametrize("memory", [232448, 166912, 101376, 8192])
def test_the_limit_that_python_asks_for_is_that_of_the_launches(gpu, matrix, memory, precision) -> None:  # type: ignore[no-untyped-def]
    gpu.chip(shared_memory=memory, major=9 if memory == 232448 else 8)
    for kind, shape, rank in all_pairs(kind=("lstm", "rnn_tanh"), shape=((12, 20), (32, 32), (64, 64)), rank=(1, 4)):
        m = matrix(*pair(kind, *shape, rank)).to(torch.float32)
        x, _, _, _, h0, c0 = inputs(m, kind, [1], torch.float32)
        call = (x, None, None, torch.tensor([1]), h0, c0, *m.arguments(), kind, False)
        fits = [gpu.fits(GATES[kind], rank, *shape, training, precision) for training in (False, True)]
        gpu.launches()
        out, _, _, workspace = torch.ops.kruify.recurrence_forward(*call, True, precision)
        forward = len(gpu.launches("PairForward")) == 1
        call = (out, h0, c0, out, workspace, torch.tensor([1]), h0, c0, *m.arguments(), kind, False)
        torch.ops.kruify.recurrence_backward(*call, precision)
        assert fits == [forward, forward and len(gpu.launches("PairBackward")) == 1]
    assert not gpu.fits(4, 1, 3, 5, False)


@pytest.mark.parametrize("memory", [232448, 166912, 101376, 8192])
def test_the_low_rank_kernel_runs_where_it_is_said_to_pay(gpu, matrix, memory) -> None:  # type: ignore[no-untyped-def]
    gpu.chip(shared_memory=memory, major=9 if memory == 232448 else 8)
    for hidden, rank in ((64, 8), (512, 24), (512, 200)):
        m = matrix(*low_rank("gru", hidden, rank), shared=(0,)).to(torch.float32)
        forward, backward = both_passes(m, "gru", 1, FLOAT32)
        pays = [gpu.pays(3, hidden, 1, rank, 1, training) for training in (False, True)]
        gpu.launches(), forward(), backward()
        ran = [launch.kernel for launch in gpu.launches(*LOW_RANK)]
        assert pays == [memory > {64: 8192, 512: 166912}[hidden] and rank < 100] * 2
        assert len(ran) == 2 or not any(pays)
        assert "LowRankForward" in str(ran) or not gpu.one_launch(3, hidden, 1, rank, 1)


@pytest.mark.parametrize(
    "sizes", [(1 << 40, 1, 8), (1 << 16, 4, 1 << 16), (1024, 1 << 40, 1 << 40), (6, 1, 2), (8, 1, 0)]
)
def test_what_the_low_rank_kernel_cannot_take_does_not_pay(gpu, sizes) -> None:  # type: ignore[no-untyped-def]
    assert not any(gpu.pays(4, *sizes, 1, training) for training in (False, True))


def test_a_cuda_graph_makes_steps_pay(gpu) -> None:  # type: ignore[no-untyped-def]
    """Of an H200's 1024 units rank 128 fits in no kernel, and rank 512 of each gate pays in no way."""
    assert not gpu.one_launch(4, 1024, 1, 128, 64)
    assert [gpu.pays(4, 1024, 1, 128, 64, False, kept=kept) for kept in (False, True)] == [False, True]
    assert not gpu.pays(4, 1024, 4, 512, 64, False, kept=True)


def test_what_stands_beside_low_rank_is_asked_for_too(gpu) -> None:  # type: ignore[no-untyped-def]
    huge = 1 << 40
    assert gpu.pays(4, 512, 1, 24, 64, True, beside=(1, 32, 16, 200, 8))
    assert not gpu.pays(4, 512, 1, 24, 64, False, beside=(0, 0, 0, 60000, 8))  # a residual of nearly half of W
    for wrong in ((huge, 32, 16, 0, 0), (1, 32, 32, 0, 0), (1, huge, huge, 0, 0), (0, 0, 0, huge, huge)):
        assert not gpu.pays(4, 512, 1, 24, 64, False, beside=wrong)


@pytest.mark.parametrize("rank", [1, 7, 8, 15, 16])
@pytest.mark.parametrize("shape", [(4096, 4), (4, 4096), (16384, 16384)], ids=str)
def test_what_is_far_too_large_does_not_fit(gpu, shape, rank) -> None:  # type: ignore[no-untyped-def]
    """Also where the bytes are more than an int counts."""
    assert not any(gpu.fits(4, rank, *shape, training) for training in (False, True))


def test_a_gpu_without_code_is_said_not_to_fit_and_refused(gpu, matrix) -> None:  # type: ignore[no-untyped-def]
    gpu.chip(major=7)
    assert not gpu.fits(1, 1, 4, 4, False)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(m := matrix(*pair("gru", 4, 4)), "gru", inputs(m, "gru", [1]), False, "cpu", torch.float32)


def test_a_layer_that_runs_on_them_says_once_that_no_gpu_has(gpu) -> None:  # type: ignore[no-untyped-def]
    kernel._asked.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        assert all(kernel.template_fits(4, 1, 16, n, False, FLOAT32, 0) for n in (16, 32, 64))
        assert not kernel.template_fits(4, 64, 64, 64, False, FLOAT32, 0)
    kernel._asked.cache_clear()
    assert len(told) == 1 and "docs/gpu.md" in str(told[0].message)


@pytest.mark.parametrize(("kind", "folded"), [("lstm", True), ("gru", False), ("rnn_tanh", True)])
def test_no_step_reads_a_bias_that_goes_with_the_input_s(gpu, matrix, kind, folded) -> None:  # type: ignore[no-untyped-def]
    """The launch has no room for one then; the GRU's stands inside of r * (...)."""
    room = []
    for bias in (False, True):
        m = matrix(*pair(kind, 16, 16), bias=bias)
        parity(m, kind, [2, 1], False, torch.float32, "cpu", columns=3)
        room.append(gpu.launches("PairForward")[0].bytes)
    assert (room[0] == room[1]) == folded


def one_past(t: Any) -> Any:
    """The same numbers one element past an aligned address."""
    return None if t is None else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("products", [FLOAT32, *LOWER], ids=lambda p: NAMES[p])
@pytest.mark.parametrize("shape", [(16, 16), (3, 8)], ids=str)
def test_any_address_will_do(gpu, matrix, shape, products) -> None:  # type: ignore[no-untyped-def]
    """By the same kernels: what they cannot load is copied."""
    m = matrix(*pair("lstm", *shape), diagonal=(1,)).to(torch.float32)
    x, _, _, sizes, h0, c0 = inputs(m, "lstm", PACKED, torch.float32)
    results = []
    for put in (lambda t: t, one_past):
        stages, diagonal, _, _, bias, layout = m.arguments()
        own = ([put(s) for s in stages], put(diagonal), None, None, put(bias), layout)
        x1, h1, c1 = put(x), put(h0), put(c0)
        assert x1.data_ptr() % 16 == (4 if put is one_past else 0)
        call = (sizes, h1, c1, *own, "lstm", False)
        out, h, c, saved = torch.ops.kruify.recurrence_forward(x1, None, None, *call, True, products)
        gates, *rest, grads = torch.ops.kruify.recurrence_backward(put(out), h1, c1, out, saved, *call, products)
        product = torch.ops.kruify.kron_matmul_forward(h1, *own, products)
        results.append([out, h, c, gates, *rest, *grads, product])
    for got, wanted in zip(*results, strict=True):
        close("result", got, wanted, LOWER.get(products, TOLERANCE[torch.float32]))
    assert len(gpu.launches("PairForward", "PairProductPlan")) == (2 + 8 if shape == (16, 16) else 0)


def test_a_kernel_s_attributes_are_set_once_on_each_gpu(gpu, matrix) -> None:  # type: ignore[no-untyped-def]
    m, calls = matrix(*pair("gru", 32, 32)), []
    given = inputs(m, "gru", [1])
    for processors in (7, 7, 8):
        gpu.chip(processors=processors, major=8)
        gpu.library.shim_attribute_calls()
        run(m, "gru", given, False, "cpu", torch.float32)
        calls.append(gpu.library.shim_attribute_calls())
    assert calls[0] == calls[2] > 0 == calls[1]


@pytest.mark.parametrize(
    ("place", "message"),
    [((-1, 0), "outside"), ((70, 0), "outside"), ((64, 0), "outside"), ((17, 0), "outside"), ((0, -1), "outside"),
     ((0, 16), "outside"), ((48, 0), "ascend")],
)  # fmt: skip
def test_sparse_residuals_that_lead_out_of_the_matrix_are_refused(gpu, matrix, place, message) -> None:  # type: ignore[no-untyped-def]
    m = matrix(4, 16, 16, [(range(4), 1, [(4, 4), (4, 4)])], residual=6, block=16).to(torch.float32)
    m.index[:, 0] = torch.tensor([0, 0, 16, 32, 48, 48])
    x, h0 = torch.randn(2, 16), torch.randn(2, 16)
    torch.ops.kruify.kron_matmul_forward(x, *m.arguments())
    m.index[2] = torch.tensor(place)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kruify.kron_matmul_forward(x, *m.arguments())
    call = (torch.randn(2, 64), None, None, torch.tensor([2]), h0, h0.clone(), *m.arguments(), "lstm", False, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kruify.recurrence_forward(*call)


def test_more_sparse_blocks_than_rows_are_checked_too(gpu, matrix) -> None:  # type: ignore[no-untyped-def]
    m = matrix(1, 4, 4, [], diagonal=[0], residual=40, block=2).to(torch.float32)
    torch.ops.kruify.kron_matmul_forward(torch.randn(2, 4), *m.arguments())
    m.index[-1] = torch.tensor([3, 0])
    with pytest.raises(RuntimeError, match="outside"):
        torch.ops.kruify.kron_matmul_forward(torch.randn(2, 4), *m.arguments())


PLANTED = {"a fetch that never arrives": 1, "a fetch one off": 2, "one block's memory for all": 3, "another lane": 4}


PLANTED_IN = {  # matrix, sparse blocks, shared memory of a block where tensor cores have no part in it
    "two factors": (pair("lstm", 16, 32), 0, 232448),
    "low rank": (low_rank("lstm", 80, 16), 0, 30000),
    "sums": (sums("lstm", 32, 4, 8), 40, SUMS[4]),
}


@pytest.mark.parametrize(
    ("structure", "bug"),  # sums with few rows run in float32, no lane has a part in it
    [(s, b) for s in PLANTED_IN for b in PLANTED if (s, b) != ("sums", "another lane")],
)
def test_planted_bugs_show(gpu, matrix, structure, bug) -> None:  # type: ignore[no-untyped-def]
    """NaN and wrong indices: the comparison of the other tests sees them."""
    products = TF32 if bug == "another lane" else FLOAT32
    arguments, residual, memory = PLANTED_IN[structure]
    gpu.chip(processors=4, shared_memory=232448 if products else memory)
    m = matrix(*arguments, residual=residual, block=8)
    rows = 17 if products else 2
    parity(m, "lstm", [rows, rows], False, torch.float32, "cpu", products=products)
    assert products or {launch.cluster for launch in gpu.launches("PairForward", *LOW_RANK)} != {1}
    gpu.library.shim_plant(PLANTED[bug])
    with pytest.raises(AssertionError, match="off by"):
        parity(m, "lstm", [rows, rows], False, torch.float32, "cpu", products=products)


# No two threads touch one place between two barriers, one of them to write; nor two blocks of a launch.


@pytest.mark.parametrize(
    ("kind", "precision", "cluster"), all_pairs(kind=KINDS, precision=(FLOAT32, TF32, BF16), cluster=(1, 2))
)
def test_templates_have_no_races(watched, matrix, kind, precision, cluster) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=cluster * 2)
    m = matrix(*pair(kind, 16, 32, 2), diagonal=(0,))
    run(m, kind, inputs(m, kind, [2, 1]), False, "cpu", torch.float32, precision)


@pytest.mark.parametrize("precision", [FLOAT32, TF32], ids=lambda p: NAMES[p])
@pytest.mark.parametrize(("kind", "cluster"), all_pairs(kind=("lstm", "gru"), cluster=(1, 4)))
def test_low_rank_has_no_races(watched, matrix, kind, cluster, precision) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=cluster, shared_memory=MEMORY[cluster] if precision == FLOAT32 else 40000 // cluster)
    m = matrix(*low_rank(kind, 64, 8), diagonal=(0,), shared=(0,) if kind == "lstm" else ())
    run(m, kind, inputs(m, kind, [17, 16]), False, "cpu", torch.float32, precision)
    assert {launch.cluster for launch in watched.launches(*LOW_RANK)} == {cluster}


@pytest.mark.parametrize("cluster", [1, 4])
def test_sums_have_no_races(watched, matrix, cluster) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=cluster, shared_memory=SUMS[cluster])
    m = matrix(*sums("lstm", 32, 4, 8), diagonal=(0,), residual=40, block=8)
    run(m, "lstm", inputs(m, "lstm", [5, 3]), False, "cpu", torch.float32)
    assert [launch.cluster for launch in watched.launches(*LOW_RANK)] == [cluster] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_general_kernel_has_no_races(watched, matrix, kind) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*everything(kind), **EVERYTHING)
    run(m, kind, inputs(m, kind, PACKED), False, "cpu", torch.float32)


@pytest.mark.parametrize("precision", [FLOAT32, TF32, BF16], ids=lambda p: NAMES[p])
def test_products_have_no_races(watched, matrix, precision) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=2)
    for terms in ([((0, 1), 2, [(16, 32), (16, 16)])], [((0, 1), 2, [(4, 8), (8, 8), (8, 8)])]):
        m = matrix(2, 256, 512, terms, diagonal=(1,), residual=9).to(torch.float32)
        x = torch.randn(20, 512)
        torch.ops.kruify.kron_matmul_forward(x, *m.arguments(), precision)
        torch.ops.kruify.kron_matmul_backward(torch.randn(20, 512), x, *m.arguments(), precision)


def test_merging_has_no_races(watched) -> None:  # type: ignore[no-untyped-def]
    factors = [torch.randn(2, 1, *s) for s in ((2, 3), (4, 2), (3, 3))]
    stages = torch.ops.kruify.merge(factors, None, [3])
    torch.ops.kruify.merge_backward(stages, factors, None, [3])


def both_passes(m: Any, kind: str, steps: int, precision: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward pass of one sample, and its way back, as calls without arguments."""
    x, _, _, sizes, h0, c0 = inputs(m, kind, [1] * steps, torch.float32)
    matrix_of = (sizes, h0, c0, *m.arguments(), kind, False)

    def forward() -> Any:
        return torch.ops.kruify.recurrence_forward(x, None, None, *matrix_of, True, precision)

    out, h, c, workspace = forward()
    grad_c = c if kind == "lstm" else None
    return forward, lambda: torch.ops.kruify.recurrence_backward(out, h, grad_c, out, workspace, *matrix_of, precision)


def idle_barriers(watched: Any, launch: Callable[[], Any], cluster: int) -> tuple[list[int], int]:
    """The barriers without which no threads clash, from 1, and how many a thread meets."""
    watched.races(), watched.launches(), watched.barriers(), launch()
    assert {one.cluster for one in watched.launches("PairForward", "PairBackward", *LOW_RANK)} == {cluster}
    count, idle = watched.barriers(), []
    assert count >= 7 and watched.races()[0] == 0
    for left_out in range(1, count + 1):
        watched.library.shim_skip(left_out)
        launch()
        if not watched.races()[0]:
            idle.append(left_out)
    watched.library.shim_skip(0)
    return idle, count


# Sizes at which threads find what other threads left: neither units nor halves of them are multiples of the threads.
BARRIERS = {
    "float32": ((12, 20), 1, FLOAT32),
    "cluster": ((12, 24), 2, FLOAT32),
    "bf16": ((48, 48), 1, BF16),
}
LOW_RANK_BARRIERS = {"one block": (1, 60000), "cluster": (4, 16000)}


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", LOW_RANK_BARRIERS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_barrier_of_low_rank_is_needed(watched, matrix, kind, name, passes) -> None:  # type: ignore[no-untyped-def]
    cluster, memory = LOW_RANK_BARRIERS[name]
    watched.chip(processors=cluster, shared_memory=memory)
    m = matrix(*low_rank(kind, 60, 12), diagonal=(0,)).to(torch.float32)
    forward, backward = both_passes(m, kind, 3, FLOAT32)
    idle, count = idle_barriers(watched, forward if passes == "forward" else backward, cluster)
    # The last state is read by the thread that wrote it: the last barrier of the forward pass is for nobody.
    assert idle == ([count] if passes == "forward" else [])


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize(("cluster", "memory"), [(1, 60000), (4, 22000)])
def test_every_barrier_of_sums_is_needed(watched, matrix, cluster, memory, passes) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=cluster, shared_memory=memory)
    m = matrix(*sums("lstm", 16, 4, 12), diagonal=(0,), residual=30).to(torch.float32)
    forward, backward = both_passes(m, "lstm", 3, FLOAT32)
    idle, count = idle_barriers(watched, forward if passes == "forward" else backward, cluster)
    assert idle == ([count] if passes == "forward" else [])


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", BARRIERS)
@pytest.mark.parametrize("kind", ["lstm", "rnn_modrelu_complex"])
def test_every_barrier_is_needed(watched, matrix, kind, name, passes) -> None:  # type: ignore[no-untyped-def]
    """One barrier after the other left out: each time threads clash."""
    shape, cluster, precision = BARRIERS[name]
    watched.chip(processors=cluster, major=9 if cluster > 1 else 8)
    m = matrix(*pair(kind, *shape), diagonal=(0,)).of_kind(kind).to(torch.float32)
    ahead = name == "cluster" and passes == "forward"  # fetches four steps ahead, over what is stored meanwhile
    forward, backward = both_passes(m, kind, 5 if ahead else 2, precision)
    idle, count = idle_barriers(watched, forward if passes == "forward" else backward, cluster)
    # A real unit's last state is read by the thread that wrote it: in one block the last barrier is for nobody. And at
    # the sizes that tensor cores take, nor is that before the loop.
    alone = name != "cluster" and (kind, passes) == ("lstm", "forward")
    # Each step of a cluster ends with a barrier of the block for such a fetch, which the last four steps have not.
    last = set(range(9, count + 1, 4)) if ahead else set()
    assert set(idle) <= ({1, count} if name == "bf16" else {count} if alone else last)


@pytest.mark.parametrize("backward", [False, True])
def test_every_barrier_of_the_products_is_needed(watched, matrix, backward) -> None:  # type: ignore[no-untyped-def]
    watched.chip(processors=1, shared_memory=60000)
    m = matrix(1, 256, 256, [((0,), 1, [(16, 16), (16, 16)])], bias=False).to(torch.float32)
    x, grad = torch.randn(24, 256), torch.randn(24, 256)

    def product() -> None:
        if backward:
            torch.ops.kruify.kron_matmul_backward(grad, x, *m.arguments())
        else:
            torch.ops.kruify.kron_matmul_forward(x, *m.arguments())

    product()
    count = watched.barriers()
    assert count >= 4 and watched.races()[0] == 0
    for left_out in range(1, count + 1):
        watched.library.shim_skip(left_out)
        product()
        assert watched.races()[0], f"barrier {left_out} of {count}"
