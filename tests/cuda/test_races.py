"""No two threads touch the same memory between two barriers, one of them to write: the kernels' phases with every
access watched (races.h). And leaving out any barrier shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from phase_cases import KINDS, SIZES, pair

from kruify.ops.precision import BF16, FLOAT32, NAMES, TF32

EVERYTHING = {"diagonal": [0], "residual": 12}


@pytest.fixture
def quiet(races):  # type: ignore[no-untyped-def]
    """The watched phases; nothing may have clashed when the test ends."""
    races.races()
    yield races
    found, example = races.races()
    assert not found, f"{found} races, for example {example}"


def run(phases: Any, m: Any, kind: str, sizes: list[int], o: Any, passes: str = "both", reverse: bool = False) -> None:
    """Forward, backward or both, for the accesses alone: test_phases.py compares the results."""
    m = m.of_kind(kind).to(torch.float32)
    hidden, total, batch, steps = m.layout.rows, sum(sizes), sizes[0], torch.tensor(sizes)
    x = torch.randn(total, m.layout.gates * hidden)
    h0 = torch.randn(batch, hidden) / 2
    c0 = torch.randn(batch, hidden) / 2 if kind == "lstm" else None
    skipped, o.skipped = o.skipped, 0 if passes == "backward" else o.skipped
    out, _, _, workspace = phases.recurrence(x, steps, h0, c0, m, kind, reverse, o)
    o.skipped = skipped
    if passes != "forward":
        if passes == "backward":
            phases.barriers()
        grads = (torch.randn(total, hidden), torch.randn(batch, hidden), None if c0 is None else torch.randn_like(c0))
        phases.recurrence_backward(*grads, out, workspace, steps, h0, c0, m, kind, reverse, o)


def structure(kind: str) -> Any:
    """Arguments of `matrix` that only the general kernel takes."""
    gates, rows, cols, _ = pair(kind, 3, 8, 1)
    return gates, rows, cols, [(range(gates), 2, [(3, 3), (2, 2), (4, 4)]), ([gates - 1], 1, [(24, 1), (1, 24)])]


@pytest.mark.parametrize(
    ("kind", "precision", "cluster"), all_pairs(kind=KINDS, precision=(FLOAT32, TF32, BF16), cluster=(1, 2))
)
def test_templates(quiet, matrix, options, kind, precision, cluster) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 16, 32, 2), diagonal=(0,))
    for tile in (2, 4) if precision == FLOAT32 else (0,):
        run(
            quiet, m, kind, SIZES["packed"], options(cluster=cluster, precision=precision, tile=tile), reverse=tile == 4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes(quiet, matrix, options, kind) -> None:  # type: ignore[no-untyped-def]
    run(quiet, matrix(*pair(kind, 12, 20, 2)), kind, SIZES["packed"], options())
    run(quiet, matrix(*pair(kind, 4, 32, 1)), kind, [1, 1], options(cluster=8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_general_kernel(quiet, matrix, options, kind) -> None:  # type: ignore[no-untyped-def]
    run(quiet, matrix(*structure(kind), **EVERYTHING), kind, SIZES["packed"], options())


@pytest.mark.parametrize("precision", [FLOAT32, TF32, BF16], ids=lambda p: NAMES[p])
def test_products(quiet, matrix, options, precision) -> None:  # type: ignore[no-untyped-def]
    for terms in ([((0, 1), 2, [(16, 32), (16, 16)])], [((0, 1), 2, [(4, 8), (8, 8), (8, 8)])]):
        m = matrix(2, 256, 512, terms, diagonal=(1,), residual=9).to(torch.float32)
        x, grad = torch.randn(40, 512), torch.randn(40, 512)
        quiet.kron_matmul(x, m, options(precision=precision))
        quiet.kron_matmul_backward(grad, x, m, options(precision=precision))


def test_merging(quiet, options) -> None:  # type: ignore[no-untyped-def]
    factors = [torch.randn(2, *s) for s in ((2, 3), (4, 2), (3, 3))]
    stage = quiet.merge(factors, options())
    quiet.merge_backward(torch.randn_like(stage), factors, options())


# Sizes at which threads find what other threads left: neither units nor halves of them are multiples of the threads.
BARRIERS = {
    "float32": ((12, 20), {"cluster": 1}),
    "cluster": ((12, 24), {"cluster": 2}),
    "bf16": ((48, 48), {"cluster": 1, "precision": BF16}),
}


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", BARRIERS)
@pytest.mark.parametrize("kind", ["lstm", "rnn_modrelu_complex"])
def test_every_barrier_is_needed(races, matrix, options, kind, name, passes) -> None:  # type: ignore[no-untyped-def]
    """Two steps, one barrier after the other left out."""
    shape, chosen = BARRIERS[name]
    m = matrix(*pair(kind, *shape, 1), diagonal=(0,))
    races.barriers()
    run(races, m, kind, [1, 1], options(**chosen), passes)
    count = races.barriers()
    assert count >= 7 and races.races()[0] == 0
    idle = []
    for left_out in range(1, count + 1):
        run(races, m, kind, [1, 1], options(**chosen, skipped=left_out), passes)
        if not races.races()[0]:
            idle.append(left_out)
    # A real unit's last state is read by the thread that wrote it: in one block the last barrier is for nobody. And at
    # the sizes that tensor cores take, nor is that before the loop.
    alone = name != "cluster" and (kind, passes) == ("lstm", "forward")
    assert set(idle) <= ({1, count} if name == "bf16" else {count} if alone else set())


@pytest.mark.parametrize("backward", [False, True])
def test_every_barrier_of_the_products_is_needed(races, matrix, options, backward) -> None:  # type: ignore[no-untyped-def]
    m = matrix(1, 256, 256, [((0,), 1, [(16, 16), (16, 16)])], bias=False).to(torch.float32)
    x, grad = torch.randn(60, 256), torch.randn(60, 256)

    def product(o: Any) -> None:
        if backward:
            races.kron_matmul_backward(grad, x, m, o)
        else:
            races.kron_matmul(x, m, o)

    races.barriers()
    product(options())
    count = races.barriers()
    assert count >= 4 and races.races()[0] == 0
    for left_out in range(1, count + 1):
        product(options(skipped=left_out))
        assert races.races()[0], f"barrier {left_out} of {count}"
