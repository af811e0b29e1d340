"""The Kronecker Recurrent Unit against its equations written out with dense complex numpy arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.errors import UsageError
from kruify.layers import KRUGRU, KRULSTM, KRURNN
from kruify.layers.base import KRUBase
from kruify.layers.kru import KRU
from kruify.ops.reference import modrelu
from kruify.training.penalty import unitary_penalty

F64 = torch.float64


def oracle(layer: KRU, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(time, batch, features) of one layer, dense W, one step after the other."""
    w = np.ones((1, 1))
    for factor in layer.weight_hh_l0.terms[0].factors:
        w = np.kron(w, factor.detach().numpy()[0, 0])
    u, b = layer.weight_ih_l0.detach().numpy(), layer.bias_l0.detach().numpy()
    outputs = []
    for x_t in x:
        z = h @ w.T + x_t @ u.T
        h = np.maximum(np.abs(z) + b, 0) * z / np.abs(z)
        outputs.append(h)
    stacked = np.stack(outputs)
    return np.concatenate([stacked.real, stacked.imag], -1) if layer.complex_state else stacked, h


@pytest.mark.parametrize("factors", ["2x2", "4x4,2x2", "8x8"])
@pytest.mark.parametrize("complex_state", [True, False])
def test_follows_the_equations(complex_state: bool, factors: str) -> None:
    layer = KRU(3, 8, factors=factors, complex_state=complex_state, dtype=F64)
    with torch.no_grad():
        layer.bias_l0.normal_(std=0.1)
    x, h = torch.randn(5, 2, 3, dtype=F64), torch.randn(1, 2, 8, dtype=layer.state_dtype)
    output, final = layer(x, h)
    expected, expected_final = oracle(layer, x.numpy(), h[0].numpy())
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(final[0].detach().numpy(), expected_final, atol=1e-12)
    assert output.shape[-1] == layer.output_size == (16 if complex_state else 8)


def test_forms_of_input_agree() -> None:
    layer = KRU(3, 4, 2, batch_first=True, dtype=F64)
    x = torch.randn(2, 5, 3, dtype=F64)
    output, final = layer(x)
    torch.testing.assert_close(layer(x[1])[0], output[1])
    packed, packed_final = layer(pack_padded_sequence(x, torch.tensor([3, 5]), True, enforce_sorted=False))
    assert packed.data.shape == (8, 8)
    torch.testing.assert_close(packed_final[:, 1], final[:, 1])
    torch.testing.assert_close(packed_final[:, 0], layer(x[:1, :3])[1][:, 0])


@pytest.mark.parametrize("complex_state", [True, False])
def test_gradcheck(complex_state: bool) -> None:
    layer = KRU(2, 4, complex_state=complex_state, dtype=F64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 2, 2, dtype=F64)

    def output(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(output, tuple(p.detach().requires_grad_() for p in parameters))


def test_the_papers_counts_and_a_unitary_start() -> None:
    """N = 128 in 2x2 complex factors: 56 recurrent reals; W starts unitary, so nothing vanishes or explodes."""
    layer = KRU(10, 128, dtype=F64)
    numbers = sum(2 * f.numel() for f in layer.weight_hh_l0.parameters())
    assert numbers == 8 * 7
    w = layer.weight_hh_l0.to_dense()
    torch.testing.assert_close(w @ w.mH, torch.eye(128, dtype=w.dtype))
    assert unitary_penalty(layer).item() == pytest.approx(0, abs=1e-20)
    with torch.no_grad():
        layer.weight_hh_l0.terms[0].factors[0].mul_(2)
    assert unitary_penalty(layer).item() == pytest.approx(18)  # ||4 I - I||_F^2 for 2x2


@pytest.mark.parametrize(("kind", "gates"), [(KRULSTM, 4), (KRUGRU, 3), (KRURNN, 1)])
@pytest.mark.parametrize("factors", ["2x2", "4x4,2x2,2x2"])
def test_the_gated_units_take_the_same_factors(kind: type[KRUBase], gates: int, factors: str) -> None:
    """Each gate its own orthogonal product at the start, free of penalty; the penalty counts every gate's factors."""
    layer = kind(3, 16, factors=factors, dtype=F64)
    dense = layer.weight_hh_l0.to_dense().chunk(gates)
    for k, w in enumerate(dense):
        torch.testing.assert_close(w @ w.T, torch.eye(16, dtype=F64))
        assert not any(torch.allclose(w, other) for other in dense[:k])
    assert unitary_penalty(layer).item() == pytest.approx(0, abs=1e-20)
    first = layer.weight_hh_l0.terms[0].factors[0]
    with torch.no_grad():
        first[gates - 1].mul_(2)
    assert unitary_penalty(layer).item() == pytest.approx(9 * first.shape[-1])  # ||4 I - I||_F^2 of one gate's factor


@pytest.mark.parametrize("complex_state", [True, False])
def test_starts(complex_state: bool) -> None:
    torch.manual_seed(0)
    linear = KRU(4, 1024, factors="32x32", complex_state=complex_state)
    assert not linear.bias_l0.any()
    assert float(linear.weight_ih_l0.detach().abs().square().mean()) == pytest.approx(1 / 4, rel=0.1)
    small = KRU(4, 1024, factors="32x32", complex_state=complex_state, start="small")
    parts = (small.weight_ih_l0.real, small.weight_ih_l0.imag) if complex_state else (small.weight_ih_l0,)
    for part, bound in [(p, (6 / 1028) ** 0.5) for p in parts] + [(small.bias_l0, 0.01)]:
        assert bound * 0.98 < float(part.detach().max()) <= bound
        assert -bound <= float(part.detach().min()) < -0.98 * bound
        assert float(part.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_modrelu_at_zero_and_its_threshold() -> None:
    z = torch.tensor([0.0, 3 + 4j, 0.3j], requires_grad=True)
    value = modrelu(z, torch.tensor([-1.0, -1.0, -1.0]))
    torch.testing.assert_close(value.detach(), torch.tensor([0, 0.8 * (3 + 4j), 0]))
    value.abs().sum().backward()
    assert torch.isfinite(torch.view_as_real(z.grad)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 6}, "Specs that fit"),
        ({"nonlinearity": "tanh"}, "must be 'modrelu'"),
        ({"num_layers": 0}, "at least 1"),
        ({"start": "glorot"}, "'linear' or 'small'"),
        ({"dtype": torch.float16}, "float32 or float64"),
    ],
)
def test_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        KRU(**{"input_size": 3, "hidden_size": 8, **options})
    assert words in str(caught.value)
