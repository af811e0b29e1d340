"""The Kronecker Recurrent Unit on the compiled path against its loop over time, which test_kru.py checks on its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from kruify.errors import UsageError
from kruify.layers import KRU
from kruify.ops.stages import plan_complex

pytestmark = pytest.mark.usefixtures("compiled")
F64 = torch.float64
# hidden size, factors: dense, pairs, more than three factors, none a multiple of a vector's width, sums, rectangular
SPECS = [
    (1, "1x1"),
    (7, "7x7"),
    (6, "3x3,2x2"),
    (16, "2x2"),
    (32, "2x2"),
    (45, "3x3,5x5,3x3"),
    (128, "2x2"),
    (12, "2*(2x4,6x3)+12x1,1x12"),
    (24, "4x4,6x6+diag+sparse:5%"),
]


def leaves(layer: KRU) -> list[Tensor]:
    return list(layer.parameters())


def both(
    layer: KRU, x: Tensor, hx: Tensor | None, inputs: list[Tensor], lengths: Tensor | None = None
) -> list[list[Tensor]]:
    """Output, final state and all gradients of both paths; with lengths on a PackedSequence."""
    results = []
    for backend in ("kernel", "reference"):
        layer.backend = backend  # type: ignore[assignment]
        given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, final = layer(given, hx)
        output = output.data if isinstance(output, PackedSequence) else output
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        loss = (output * weights).sum() + (final * final.conj()).real.sum()
        grads = torch.autograd.grad(loss, [*inputs, *leaves(layer)], allow_unused=True, materialize_grads=True)
        results.append([output, final, *grads])
    return results


def layer_of(hidden: int, spec: str, complex_state: bool, **options: object) -> KRU:
    layer = KRU(3, hidden, factors=spec, complex_state=complex_state, dtype=F64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))  # off the unitary group, overlays and biases off 0
    return layer


@pytest.mark.parametrize("complex_state", [True, False])
@pytest.mark.parametrize(("hidden", "spec"), SPECS)
def test_equals_the_loop(hidden: int, spec: str, complex_state: bool) -> None:
    layer = layer_of(hidden, spec, complex_state, num_layers=2)
    x = torch.randn(5, 3, 3, dtype=F64, requires_grad=True)
    hx = torch.randn(2, 3, hidden, dtype=layer.state_dtype, requires_grad=True)
    for a, b in zip(*both(layer, x, hx, [x, hx]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for a, b in zip(*both(layer, x, hx, [x, hx], torch.tensor([2, 5, 4])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"bias": False}, {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}])
def test_other_real_units(options: dict[str, object]) -> None:
    layer = layer_of(16, "2x2", False, **options)
    x = torch.randn(4, 2, 3, dtype=F64, requires_grad=True)
    for a, b in zip(*both(layer, x, None, [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("complex_state", [True, False])
def test_forms_of_input(complex_state: bool) -> None:
    layer = layer_of(16, "2x2", complex_state, bias=False, batch_first=True)
    for x in (torch.randn(2, 1, 3, dtype=F64), torch.randn(6, 3, dtype=F64)):
        for a, b in zip(*both(layer, x, None, []), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "kernel", "reference"])
@pytest.mark.parametrize("complex_state", [True, False])
def test_no_steps_and_no_samples(complex_state: bool, backend: str) -> None:
    layer = KRU(3, 4, complex_state=complex_state, backend=backend)  # type: ignore[arg-type]
    hx = torch.randn(1, 2, 4, dtype=layer.state_dtype)
    output, final = layer(torch.zeros(0, 2, 3), hx)
    assert output.shape == (0, 2, layer.output_size) and torch.equal(final, hx)
    output, final = layer(torch.zeros(5, 0, 3))
    assert output.shape == (5, 0, layer.output_size) and final.shape == (1, 0, 4)


@pytest.mark.parametrize("complex_state", [True, False])
def test_float32_is_near_float64_over_a_thousand_steps(complex_state: bool) -> None:
    """A unitary W keeps the size of the state, so that rounding adds up without growing."""
    wide = KRU(3, 128, complex_state=complex_state, dtype=F64)
    layer = KRU(3, 128, complex_state=complex_state)
    with torch.no_grad():
        for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
            p.copy_(q)
            q.copy_(p)
    x = torch.zeros(1000, 2, 3)
    x[0] = torch.randn(2, 3)
    got, want = layer(x)[0][-1].double(), wide(x.double())[0][-1]
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_gradcheck() -> None:
    for complex_state in (True, False):
        layer = KRU(2, 4, complex_state=complex_state, dtype=F64, backend="kernel")
        names, parameters = zip(*layer.named_parameters(), strict=True)
        x, hx = torch.randn(3, 2, 2, dtype=F64), torch.randn(1, 2, 4, dtype=layer.state_dtype)

        def output(
            x: Tensor, hx: Tensor, *values: Tensor, layer: KRU = layer, names: tuple[str, ...] = names
        ) -> Tensor:
            tensors = dict(zip(names, values, strict=True))
            return torch.func.functional_call(layer, tensors, (x, hx))[0]  # type: ignore[no-any-return]

        inputs = [t.detach().requires_grad_() for t in (x, hx, *parameters)]
        assert torch.autograd.gradcheck(output, inputs)
        assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("complex_state", [True, False])
def test_compiles_as_one_graph(complex_state: bool) -> None:
    layer = KRU(4, 16, complex_state=complex_state, backend="kernel")
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        output, final = function(x)
        loss = output.square().sum() + final.abs().sum()
        results.append([output, final, *torch.autograd.grad(loss, leaves(layer))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("complex_state", [True, False])
def test_autocast(complex_state: bool, backend: str) -> None:
    layer = KRU(3, 16, complex_state=complex_state, backend=backend)  # type: ignore[arg-type]
    x = torch.randn(4, 2, 3)
    exact, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, final = layer(x)
        layer(x, final)
    assert output.dtype == torch.bfloat16
    assert final.dtype == (torch.complex64 if complex_state else torch.bfloat16)
    assert (output.float() - exact).norm() <= 0.02 * exact.norm()


def test_without_derivatives_the_same_and_copies_follow_their_own_parameters() -> None:
    layer = layer_of(16, "2x2", True)
    x = torch.randn(4, 2, 3, dtype=F64)
    with torch.no_grad():
        before = layer(x)[0]
        twin = copy.deepcopy(layer)
        layer.weight_hh_l0.term_list()[0].factors[1].mul_(0.5)
        assert torch.equal(twin(x)[0], before)
        changed = layer(x)[0]
    assert torch.equal(layer(x)[0].detach(), changed) and not torch.allclose(changed, before)


def test_refused() -> None:
    with pytest.raises(UsageError, match="backend='auto'"):
        KRU(3, 8, backend="kernel")(torch.zeros(2, 1, 3, dtype=F64))
    with pytest.raises(UsageError, match="must be 'auto', 'kernel' or 'reference'"):
        KRU(3, 8, backend="dense")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="complex64"):
        KRU(3, 8)(torch.zeros(2, 1, 3), torch.zeros(1, 1, 8))


def test_plan_of_complex_factors() -> None:
    """Small matrices in full, large ones as a pair of balanced stages, for CUDA such that its templates take them."""
    assert plan_complex(((2, 2),) * 3, 1).shapes == ((16, 16),)
    assert plan_complex(((2, 2),) * 7, 1).shapes == ((16, 16), (16, 16))
    assert plan_complex(((2, 2),) * 9, 1).shapes == ((32, 32), (32, 32))
    assert plan_complex(((2, 2),) * 3, 1, templates=True).shapes == ((4, 4), (4, 4))
    assert plan_complex(((7, 7),), 1, templates=True).shapes == ((14, 14),)
