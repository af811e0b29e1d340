"""The compiled recurrences against the float64 reference, and the reference against torch's own layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from ops_cases import BATCHES, GATES, MATRICES, cast, differentiable, recurrence_arguments, replace
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kruify.ops import Layout, reference

OPERATOR = torch.ops.kruify.recurrence
DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-5)]


def outputs(arguments: list[Any]) -> list[Tensor]:
    out, h, c, _ = OPERATOR(*arguments)
    return [out, h, c] if arguments[12] == "lstm" else [out, h]


def expected(arguments: list[Any]) -> list[Tensor]:
    return [t for t in reference.recurrence(*arguments[:-1])[:3] if t is not None]


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.shape == wanted.shape
    assert (actual.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-30


def follow_reference(wide: list[Any]) -> None:
    """Outputs and gradients of the operator in both precisions, against the reference's in float64."""
    want = expected(wide)
    upstream = [torch.randn_like(t) for t in want]
    want_grads = torch.autograd.grad(want, differentiable(wide), upstream, allow_unused=True, materialize_grads=True)
    for dtype, tolerance in DTYPES:
        arguments = cast(wide, dtype)
        actual = outputs(arguments)
        for a, w in zip(actual, want, strict=True):
            assert_near(a, w, tolerance)
        grads = torch.autograd.grad(
            actual,
            differentiable(arguments),
            [u.to(dtype) for u in upstream],
            allow_unused=True,
            materialize_grads=True,
        )
        for a, w in zip(grads, want_grads, strict=True):
            assert_near(a, w, tolerance)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("kind", "matrix", "reverse"),
    all_pairs(
        lambda kind, matrix, reverse: matrix != "257" or kind != "rnn_modrelu_complex",
        kind=tuple(GATES), matrix=tuple(MATRICES), reverse=(False, True),
    ),
)  # fmt: skip
def test_outputs_and_gradients(kind: str, matrix: str, reverse: bool) -> None:
    for sizes in BATCHES[:1] if matrix == "257" else BATCHES:
        projected = len(sizes) == 3
        follow_reference(
            recurrence_arguments(kind, matrix, sizes, reverse, projected=projected, extras=len(sizes) != 4)
        )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_more_steps_than_the_kernels_take_at_once(kind: str, reverse: bool) -> None:
    follow_reference(recurrence_arguments(kind, "256", (90, 90, 60, 60, 60, 11, 11, 2), reverse))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "inputs"), list(zip(GATES, itertools.cycle((1, 70, 300)))))
def test_layer_backward(kind: str, inputs: int) -> None:
    x, weight, *rest = [a.detach() if isinstance(a, Tensor) else a for a in recurrence_arguments(kind, "50", (9, 9, 3))]
    x, weight = torch.randn(x.shape[0], inputs, dtype=x.dtype), torch.randn(weight.shape[0], inputs, dtype=x.dtype)
    out, h, c, workspace = torch.ops.kruify.recurrence_forward(x, weight, *rest)
    upstream = [torch.randn_like(t) for t in (out, h, c)]
    given, saved = [*upstream[:2], upstream[2] if kind == "lstm" else None], [out, workspace, *rest[1:-1]]
    of_gates, *want = torch.ops.kruify.recurrence_backward(*given, *saved)
    for wanted in ((True, True, True), (False, True, False), (True, False, True)):
        *of_input, h0, c0, matrix = torch.ops.kruify.layer_backward(*given, x, weight, *saved, *wanted)
        torch.testing.assert_close([h0, c0, matrix], want)
        found = [g for g, w in zip(of_input, wanted, strict=True) if w or g.numel()]
        products = (of_gates @ weight, of_gates.T @ x, of_gates.sum(0))
        torch.testing.assert_close(found, [p for p, w in zip(products, wanted, strict=True) if w])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_infinite_gates_saturate(kind: str) -> None:
    for dtype, tolerance in DTYPES:
        arguments = recurrence_arguments(kind, "pair", (3, 3, 2), dtype=dtype, projected=True)
        with torch.no_grad():
            for place, value in enumerate((torch.inf, -torch.inf, 1e30, -1e30)):
                arguments[0][place::7] = value
            for actual, want in zip(outputs(arguments), expected(arguments), strict=True):
                assert want.isfinite().all()
                assert_near(actual, want.double(), tolerance)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "block"), list(zip(GATES, itertools.cycle((1, 3, 8)))))
def test_overlays_of_many_samples(kind: str, block: int) -> None:
    """More samples than a vector has lanes, sequences that end inside a tile of them, both directions."""
    sizes = (37, 33, 20, 2)
    for reverse in (False, True):
        wide = recurrence_arguments(kind, "pair" if block == 8 else "overlay", sizes, reverse)
        hidden = wide[4].shape[1]
        rows = torch.randint(0, GATES[kind] * hidden // block, (90,)).sort().values * block
        rows = rows[rows % hidden <= hidden - block]
        wide[8] = (0.3 * torch.randn(len(rows), block, dtype=torch.float64)).requires_grad_()
        wide[9] = torch.stack([rows, torch.randint(0, hidden, (len(rows),))], dim=1).int()
        want = expected(wide)
        upstream = [torch.randn_like(t) for t in want]
        want_grads = torch.autograd.grad(want, differentiable(wide), upstream)
        for dtype, tolerance in DTYPES:
            arguments = cast(wide, dtype)
            actual = outputs(arguments)
            grads = torch.autograd.grad(actual, differentiable(arguments), [u.to(dtype) for u in upstream])
            for a, w in zip([*actual, *grads], [*want, *want_grads], strict=True):
                assert_near(a, w, tolerance)


@pytest.mark.parametrize("kind", [k for k in GATES if k not in reference.MODRELU])
def test_reference_is_torchs_layer(kind: str) -> None:
    """The oracle's own oracle: torch.nn's layer with the densified weight."""
    sizes = (5, 3, 3, 1)
    arguments = recurrence_arguments(kind, "tiny", sizes)
    x, w_ih, bias_ih, batch_sizes, h0, c0, stages, diagonal, overlay, index, bias, layout, *_ = arguments
    dense = reference.kron_matmul(torch.eye(6, dtype=x.dtype), stages, diagonal, overlay, index, None, layout).T
    name, options = kind.partition("_")[::2]
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[name](
        3, 6, dtype=x.dtype, **({"nonlinearity": options} if options else {})
    )
    state = {"weight_ih_l0": w_ih, "weight_hh_l0": dense, "bias_ih_l0": bias_ih, "bias_hh_l0": bias}
    layer.load_state_dict({k: v.detach() for k, v in state.items()})
    hx = h0[None] if c0 is None else (h0[None], c0[None])
    want, final = layer(PackedSequence(x, batch_sizes), hx)
    out, h, c, _ = reference.recurrence(*arguments[:-1])
    torch.testing.assert_close(out, want.data, rtol=0, atol=1e-12)
    torch.testing.assert_close(h, (final[0] if c0 is not None else final)[0], rtol=0, atol=1e-12)
    if c is not None:
        torch.testing.assert_close(c, final[1][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", GATES)
def test_first_and_second_derivatives(kind: str) -> None:
    arguments = recurrence_arguments(kind, "tiny", (2, 1))

    def function(*tensors: Tensor) -> list[Tensor]:
        return outputs(replace(arguments, list(tensors)))

    tensors = differentiable(arguments)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", ["lstm", "gru", *reference.MODRELU])
def test_opcheck(kind: str) -> None:
    torch.library.opcheck(OPERATOR, tuple(recurrence_arguments(kind, "tiny", (3, 2, 1))))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", GATES)
def test_without_derivatives_the_same(kind: str) -> None:
    arguments = recurrence_arguments(kind, "chain", (5, 5, 2))
    with torch.no_grad():
        for a, b in zip(OPERATOR(*arguments)[:3], OPERATOR(*arguments[:-1], False)[:3], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(OPERATOR(*arguments), torch.ops.kruify.recurrence_forward(*arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("compiled")
def test_threads_do_not_change_outputs() -> None:
    arguments = cast(recurrence_arguments("lstm", "256", (7, 7, 3)), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs(arguments))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("compiled")
def test_nan_of_the_input_stays_in_its_sample() -> None:
    arguments = recurrence_arguments("lstm", "pair", (3, 3), extras=False)
    with torch.no_grad():
        arguments[0][1] = torch.nan
        out = outputs(arguments)[0]
    assert out[1].isnan().all() and out[4].isnan().all()
    assert out[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.usefixtures("compiled")
def test_saturated_gates_are_finite() -> None:
    for kind in GATES:
        arguments = cast(recurrence_arguments(kind, "pair", (2, 2), projected=True), torch.float32)
        with torch.no_grad():
            arguments[0].mul_(1e4)
        wide = cast(arguments, torch.float64)
        for a, w in zip(outputs(arguments), expected(wide), strict=True):
            assert a.isfinite().all()
            assert_near(a, w, 1e-5)  # of the norm: relu's states are up to 1e4, and differences of such


@pytest.mark.usefixtures("compiled")
def test_small_activations_keep_their_relative_accuracy() -> None:
    arguments = cast(recurrence_arguments("rnn_tanh", "pair", (2, 2), extras=False, projected=True), torch.float32)
    with torch.no_grad():
        for t in (arguments[0], arguments[4]):
            t.mul_(1e-6)
    for a, w in zip(outputs(arguments), expected(cast(arguments, torch.float64)), strict=True):
        assert_near(a, w, 1e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", reference.MODRELU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modrelu_where_it_has_no_derivative_and_at_the_ends_of_the_range(kind: str, dtype: torch.dtype) -> None:
    """z = 0, |z| + b = 0, infinitesimal and huge z, with b below, at and above 0."""
    big = torch.finfo(dtype).max / 4
    z = torch.tensor([0.0, 1.0, -1.0, 3.0, 1e-30, big, -big, torch.finfo(dtype).tiny], dtype=dtype)
    parts = [z.repeat(24), z.repeat_interleave(8).repeat(3)] if kind == "rnn_modrelu_complex" else [z.repeat(24)]
    x = torch.cat(parts)[None]
    layout = Layout(1, x.shape[1], x.shape[1], (), ()).encode()
    b = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).repeat_interleave(64)
    results = []
    for function in (OPERATOR, lambda *a: reference.recurrence(*a[:-1])):
        leaves = [x.clone().requires_grad_(), b.clone().requires_grad_()]
        out = function(
            leaves[0], None, None, torch.tensor([1]), torch.zeros_like(x), None, [], None, None, None, leaves[1],
            layout, kind, False, True,
        )[0]  # fmt: skip
        grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, x.shape[1], dtype=dtype)[None])
        results.append([out, *grads])
    for a, w in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, w, rtol=2e-6 if dtype == torch.float32 else 1e-14, atol=1e-6, equal_nan=True)
    assert results[0][0][0, 0] == 0 and results[0][1][0, 0] == 0
