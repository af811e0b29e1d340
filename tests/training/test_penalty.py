from __future__ import annotations

import pytest
import torch
from tiny import Cell, Delay
from torch import nn

from kruify.factors import parse
from kruify.layers.matrix import KroneckerMatrix
from kruify.training import default_penalty, unitary_penalty


def by_hand(matrix: KroneckerMatrix) -> float:
    total = 0.0
    for term in matrix.term_list():
        for factor in term.factors:
            for gate in factor:
                for w in gate:
                    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
                    total += ((gram - torch.eye(len(gram), dtype=w.dtype)) ** 2).sum().item()
    return total


@pytest.mark.parametrize("spec", ["2x2", "3*(4x4,2x2)", "2*(4x2,2x4)+1*(8x1,1x8)+diag", "4x4,2x2"])
def test_equals_the_sum_over_factors(spec: str) -> None:
    matrix = KroneckerMatrix([parse(spec).resolve(8, 8)] * 3).double()
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert unitary_penalty(matrix).item() == pytest.approx(by_hand(matrix), rel=1e-12)


def test_orthogonal_factors_cost_nothing_and_others_something() -> None:
    matrix = KroneckerMatrix([parse("2x2").resolve(8, 8)], dtype=torch.float64)
    assert unitary_penalty(matrix).item() == pytest.approx(0, abs=1e-24)
    with torch.no_grad():
        matrix.term_list()[0].factors[1].mul_(2)
    # ||4 I - I||^2 of a 2x2 factor
    assert unitary_penalty(matrix).item() == pytest.approx(18)


def test_gradient() -> None:
    matrix = KroneckerMatrix([parse("2*(4x2,2x4)").resolve(8, 8)]).double()

    def penalty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        parametrised = torch.func.functional_call
        names = [n for n, _ in matrix.named_parameters()]
        return parametrised(Penalty(matrix), {f"matrix.{n}": t for n, t in zip(names, (a, b), strict=True)}, ())

    inputs = tuple((p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for p in matrix.parameters())
    assert torch.autograd.gradcheck(penalty, inputs)


class Penalty(nn.Module):
    def __init__(self, matrix: KroneckerMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self) -> torch.Tensor:
        return unitary_penalty(self)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_factors_give_a_real_penalty() -> None:
    matrix = KroneckerMatrix([parse("2x2").resolve(8, 8)], dtype=torch.float64).to(torch.complex128)
    phase = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    with torch.no_grad():
        matrix.term_list()[0].factors[0].mul_(phase)
    penalty = unitary_penalty(matrix)
    assert not penalty.is_complex()
    assert penalty.item() == pytest.approx(0, abs=1e-20)


def test_input_weights_are_left_out() -> None:
    model = nn.Module()
    model.weight_ih_l0 = KroneckerMatrix([parse("4x4,2x2").resolve(8, 8)])
    with torch.no_grad():
        next(model.weight_ih_l0.parameters()).mul_(3)
    assert unitary_penalty(model).item() == 0


def test_dense_model_has_none() -> None:
    assert float(unitary_penalty(Cell(3, 8, 4))) == 0


def test_on_by_default_for_plain_rnns_only() -> None:
    assert default_penalty(Delay(gates=1).kronecker()) > 0
    assert default_penalty(Delay(gates=3).kronecker()) == 0
    assert default_penalty(Delay().model()) == 0
