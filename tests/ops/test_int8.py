"""The eight-bit operators against numpy: the same integers, float32 sums to 1e-6."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from all_pairs import all_pairs
from int8_oracle import F32, Array, Matrix, cell
from ops_cases import GATES
from torch import Tensor

from kruify.ops import Layout

pytestmark = pytest.mark.usefixtures("compiled")
ops = torch.ops.kruify
HERE = Path(__file__).parent


def draw(gates: int, rows: int, cols: int, form: str, seed: int = 0) -> Matrix:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (random.standard_normal(shape) * shape[-1] ** -0.5).astype(F32)

    if form == "dense":
        return Matrix(normal(gates * rows, cols), [(0, cols)] * gates, cols)
    if form == "stacked":  # all gates share the first matrix
        return Matrix(normal(gates * rows, 7), [(0, 7)] * gates, cols, normal(7, cols))
    ranks = [3 + 2 * g for g in range(gates)]  # each gate has its own rows, from a multiple of four on
    starts = [sum(-(-r // 4) * 4 for r in ranks[:g]) for g in range(gates)]
    first = normal(starts[-1] + ranks[-1], cols)
    return Matrix(normal(gates * rows, max(ranks)), list(zip(starts, ranks, strict=True)), cols, first)


def pack(matrix: Matrix) -> tuple[Tensor, list[int]]:
    first = None if matrix.first is None else torch.from_numpy(matrix.first)
    return ops.int8_pack(first, torch.from_numpy(matrix.second), matrix.layout), matrix.layout


@pytest.mark.parametrize(
    ("form", "gates", "rows", "cols", "count"),
    all_pairs(
        form=("dense", "stacked", "own"), gates=(1, 3, 4), rows=(1, 31, 64), cols=(1, 30, 64, 257), count=(1, 3, 8, 50)
    ),
)
def test_linear_has_the_oracle_s_bits(form: str, gates: int, rows: int, cols: int, count: int) -> None:
    matrix = draw(gates, rows, cols, form)
    x = np.random.default_rng(1).standard_normal((count, cols)).astype(F32)
    np.testing.assert_array_equal(ops.int8_linear(torch.from_numpy(x), *pack(matrix)).numpy(), matrix.multiply(x))


def test_extreme_integers_are_summed_exactly() -> None:
    """Where 16 bits saturate, or signs are lost."""
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=F32)
    weight, x = np.tile(signs, (1, 2048)), np.tile(signs, (1, 2048))
    matrix = Matrix(weight, [(0, 4096)], 4096)
    np.testing.assert_array_equal(ops.int8_linear(torch.from_numpy(x), *pack(matrix)).numpy(), matrix.multiply(x))


def run(
    kind: str, recurrent: Matrix, inputs: Matrix | None, x: Array, sizes: tuple[int, ...], h: Array, c: Array,
    bias: Any, rest: Any = (None, None, None), reverse: bool = False,
) -> list[Array]:  # fmt: skip
    first = (*pack(inputs), None, None) if inputs else (None, [], None, None)
    hidden, gates, t = h.shape[1], GATES[kind], torch.from_numpy
    layout = Layout(gates, hidden, hidden, (gates - 1,) if rest[0] is not None else (), ()).encode()
    found = ops.int8_recurrence(
        t(x), *first, *(b if b is None else t(b) for b in bias[:1]), torch.tensor(sizes), t(h),
        t(c) if kind == "lstm" else None, *pack(recurrent), [], *(r if r is None else t(r) for r in rest),
        None if bias[1] is None else t(bias[1]), layout, kind, reverse,
    )  # fmt: skip
    return [f.numpy() for f in found]


KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@pytest.mark.parametrize(
    ("kind", "form", "of_input", "sizes", "hidden", "rest", "biased", "reverse"),
    all_pairs(
        kind=KINDS,
        form=("dense", "stacked", "own"),
        of_input=("dense", "stacked", "own", "none"),
        sizes=((1,) * 5, (3, 3, 2, 1), (8, 8, 5), (17, 17, 4, 0)),
        hidden=(8, 21, 40),
        rest=("none", "single entries", "blocks and diagonal"),
        biased=(True, False),
        reverse=(False, True),
    ),
)
def test_every_step_is_the_oracle_s(
    kind: str, form: str, of_input: str, sizes: tuple[int, ...], hidden: int, rest: str, biased: bool, reverse: bool
) -> None:
    """Each step is compared from the operator's own state: an error in the last bit may round the next h otherwise."""
    gates, batch, random = GATES[kind], sizes[0], np.random.default_rng(2)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(F32)

    recurrent = draw(gates, hidden, hidden, form)
    inputs = None if of_input == "none" else draw(gates, hidden, 13, of_input, seed=1)
    x = normal(sum(sizes), gates * hidden if inputs is None else 13)
    h, c = normal(batch, hidden), normal(batch, hidden)
    bias = [normal(gates * hidden), normal(gates * hidden)] if biased else [None, None]
    parts, more = (None, None, None), np.zeros((gates * hidden, hidden))
    if rest != "none":
        block = 1 if rest == "single entries" else 4
        rows = np.sort(random.integers(0, hidden // block, 9)) * block
        index = np.stack([rows, random.integers(0, hidden, 9)], 1).astype(np.int32)
        values, diagonal = normal(9, block), normal(1, hidden) if block > 1 else None
        parts = (diagonal, values, index)
        for (row, column), value in zip(index, values, strict=True):
            more[row : row + block, column] += value
        if diagonal is not None:
            more[-hidden:] += np.diag(diagonal[0])
    out, last_h, last_c = run(kind, recurrent, inputs, x, sizes, h, c, bias, parts, reverse)

    share = x.astype(np.float64) if inputs is None else inputs.multiply(x).astype(np.float64)
    share += bias[0].astype(np.float64) if biased else 0
    starts, before, cells = np.concatenate([[0], np.cumsum(sizes)]), h.copy(), c.astype(np.float64)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n, row = sizes[t], starts[t]
        if n == 0:
            continue
        wanted, cells[:n] = cell(
            kind, share[row : row + n], recurrent.multiply(before[:n]) + before[:n] @ more.T,
            bias[1].astype(np.float64) if biased else np.zeros(1), before[:n].astype(np.float64), cells[:n],
        )  # fmt: skip
        np.testing.assert_allclose(out[row : row + n], wanted, atol=1e-6, rtol=1e-6)
        before[:n] = out[row : row + n]
    np.testing.assert_array_equal(last_h, before)
    if kind == "lstm":
        np.testing.assert_allclose(last_c, cells, atol=3e-6)  # summed up over the steps


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_drift_over_10000_steps_is_bounded(kind: str) -> None:
    """Against float64 with the same rounded weights: what is left is the rounding of h, x and the middle vector."""
    hidden, steps, gates = 16, 10_000, GATES[kind]
    recurrent, inputs = draw(gates, hidden, hidden, "stacked"), draw(gates, hidden, 13, "dense", seed=1)
    x = np.random.default_rng(3).standard_normal((steps, 13)).astype(F32)
    zero = np.zeros((1, hidden), F32)
    out, _, _ = run(kind, recurrent, inputs, x, (1,) * steps, zero, zero, [None, None])
    w_hh, share = recurrent.dense().T, x @ inputs.dense().T
    h, c, wanted = zero.astype(np.float64), zero.astype(np.float64), np.empty((steps, hidden))
    for t in range(steps):
        h, c = cell(kind, share[t : t + 1], h @ w_hh, np.zeros(1), h, c)
        wanted[t] = h[0]
    error = np.abs(out - wanted)
    assert 1e-5 < error.mean() < 5e-3 and error.max() < 0.1
    assert error[-1000:].mean() < 2 * error[:1000].mean()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_sample_nan_and_no_other(bad: float) -> None:
    recurrent, inputs = draw(4, 12, 12, "stacked"), draw(4, 12, 13, "dense")
    x = np.random.default_rng(4).standard_normal((6, 13)).astype(F32)
    zero = np.zeros((2, 12), F32)
    clean, *_ = run("lstm", recurrent, inputs, x, (2, 2, 2), zero, zero, [None, None])
    x[2, 5] = bad  # step 1, sample 0
    out, *_ = run("lstm", recurrent, inputs, x, (2, 2, 2), zero, zero, [None, None])
    assert np.isnan(out[[2, 4]]).all()
    np.testing.assert_array_equal(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-44, 1e37])
def test_tiny_and_huge_rows_are_finite(size: float) -> None:
    matrix = draw(1, 9, 13, "dense")
    x = np.full((1, 13), size, F32)
    found = ops.int8_linear(torch.from_numpy(x), *pack(matrix)).numpy()
    np.testing.assert_allclose(found, x.astype(np.float64) @ matrix.dense().T, rtol=1e-5, atol=1e-35)


def test_a_row_of_weights_that_is_not_finite_is_nan_alone() -> None:
    weight = torch.ones(5, 6)
    weight[2, 3] = torch.inf
    found = ops.int8_linear(torch.ones(2, 6), ops.int8_pack(None, weight, [1, 5, 6, 0, 0, 6]), [1, 5, 6, 0, 0, 6])
    assert found[:, 2].isnan().all() and torch.equal(found[:, [0, 1, 3, 4]], torch.full((2, 4), 6.0))


DENSE = [1, 5, 6, 0, 0, 6]


@pytest.mark.parametrize(
    ("first", "second", "layout", "message"),
    [
        (None, torch.zeros(5, 6), [1, 5, 6, 0, 0], "layout ends"),
        (None, torch.zeros(5, 6), [*DENSE, 1], "goes on"),
        (None, torch.zeros(5, 6), [9, 5, 6, 0, 0, 6], "number of gates"),
        (None, torch.zeros(5, 6), [1, 5, 1 << 17, 0, 0, 6], "cols"),
        (None, torch.zeros(5, 6), [1, 5, 6, 0, 2, 4], "multiple of four"),
        (None, torch.zeros(5, 6), [1, 5, 6, 0, 4, 3], "number of columns"),
        (None, torch.zeros(5, 5), DENSE, "has 6 columns of 5"),
        (None, torch.zeros(4, 6), DENSE, "second matrix has size 4"),
        (None, torch.zeros(5, 6, dtype=torch.float64), DENSE, "another dtype"),
        (torch.zeros(2, 6), torch.zeros(5, 6), DENSE, "two a rank"),
        (None, torch.zeros(5, 2), [1, 5, 6, 2, 0, 2], "two a rank"),
        (torch.zeros(2, 5), torch.zeros(5, 2), [1, 5, 6, 2, 0, 2], "first matrix has size 5"),
    ],
)
def test_pack_refuses(first: Tensor | None, second: Tensor, layout: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.int8_pack(first, second, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(7, dtype=torch.int8)}, "has size 7"),
        ({"packed": torch.zeros(7)}, "another dtype"),
        ({"x": torch.zeros(2, 5)}, "x has size 5"),
        ({"x": torch.zeros(2, 6, dtype=torch.float64)}, "another dtype"),
        ({"layout": [1, 500, 6, 0, 0, 6]}, "the packed matrix has size"),
    ],
)
def test_linear_refuses(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 6), "packed": ops.int8_pack(None, torch.zeros(5, 6), DENSE), "layout": DENSE} | change
    with pytest.raises(RuntimeError, match=message):
        ops.int8_linear(*given.values())


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_go_in_and_out_as_they_are(kind: str) -> None:
    """Without batch_sizes x has its three dimensions, and states may have a first one."""
    gates, random = GATES[kind], torch.Generator().manual_seed(4)
    x, h, c = (torch.randn(*shape, generator=random) for shape in ((5, 3, 8 * gates), (3, 8), (3, 8)))
    c0, layout = c if kind == "lstm" else None, Layout(gates, 8, 8, (), ()).encode()
    rest = (*pack(draw(gates, 8, 8, "dense")), [], None, None, None, None, layout, kind, False)
    no_input = (None, [], None, None, None)
    packed = ops.int8_recurrence(x.flatten(0, 1), *no_input, torch.full((5,), 3), h, c0, *rest)
    for first in ((), (1,)):
        states = (h.view(*first, 3, 8), None if c0 is None else c0.view(*first, 3, 8))
        found = ops.int8_recurrence(x.transpose(0, 1).contiguous().transpose(0, 1), *no_input, None, *states, *rest)
        assert [t.shape for t in found[:2]] == [(5, 3, 8), (*first, 3, 8)]
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, packed, strict=True))
    for wrong, h0 in ((x[0], h), (x, h[:2]), (x, h.expand(2, 3, 8)), (x.double(), h), (x[:, :, 1:], h)):
        with pytest.raises(RuntimeError):
            ops.int8_recurrence(wrong, *no_input, None, h0, c0, *rest)


def test_a_packed_matrix_between_other_bytes_is_refused() -> None:
    packed = ops.int8_pack(None, torch.zeros(5, 6), DENSE)
    with pytest.raises(RuntimeError, match="aligned"):
        ops.int8_linear(torch.zeros(2, 6), torch.cat([packed[:1], packed])[1:], DENSE)


@pytest.mark.parametrize("bits", [256, 512])
def test_vnni_has_the_same_bits_as_far_as_it_can_be_emulated(tmp_path: Path, bits: int) -> None:
    """The same template on an emulated vpdpbusd: see int8_emulated.cpp."""
    if platform.machine() != "x86_64" or not (shutil.which("g++") and int(ops.instruction_set())):
        pytest.skip("needs g++ and AVX2")
    if bits == 512 and not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is not installed")
    csrc, program = HERE.parents[1] / "kruify" / "csrc", tmp_path / "emulated"
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-Wno-psabi",
        f"-I{csrc}",
        "-mavx2",
        "-mfma",
        f"-DEMULATE={bits}",
    ]
    sources = [HERE / "int8_emulated.cpp", csrc / "int8_portable.cpp"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
    assert "192 cases" in subprocess.run([program], check=True, capture_output=True, text=True).stdout


def products() -> Array:
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((11, 61)).astype(F32))
    return np.stack([ops.int8_linear(x, *pack(draw(4, 33, 61, form))).numpy() for form in ("dense", "stacked", "own")])


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_has_the_same_bits(tmp_path: Path, isa: str) -> None:
    if isa == "avx2" and int(ops.int8_instruction_set()) < 2:
        pytest.skip("nothing above AVX2 here")
    code = "import sys, numpy; from test_int8 import products; numpy.save(sys.argv[1], products())"
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "KRUIFY_ISA": isa}
    subprocess.run([sys.executable, "-c", code, tmp_path / "other.npy"], check=True, env=environment)
    np.testing.assert_array_equal(products(), np.load(tmp_path / "other.npy"))
