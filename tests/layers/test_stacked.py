"""Stacked gates: every gate has its own rows of the first factor, all share the others. The oracle is torch.kron."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.factors import parse
from kruify.layers import KRUGRU, KRULSTM
from kruify.layers.cells import KRULSTMCell
from kruify.layers.matrix import KroneckerMatrix
from kruify.ops import backend_info

GATES = {KRULSTM: 4, KRUGRU: 3}
SPECS = {  # of GATES x 16 rows and 16 columns
    "low rank": "stacked:3*({0}x1,1x16)",
    "pair": "stacked:2*({1}x4,4x4)",
    "chain": "stacked:2*({2}x2,2x4,4x2)",
    "one factor": "stacked:{0}x16",
    "rows in common": "stacked:2*({3}x16,16x1)",
    "sum": "stacked:2*({0}x1,1x16)+{1}x2,4x8+sparse:6%:2",
    "overlay alone": "stacked:sparse:6%:1",
}


def spec_of(name: str, gates: int) -> str:
    return SPECS[name].format(gates * 16, gates * 4, gates * 2, gates)


def oracle(matrix: KroneckerMatrix) -> Tensor:
    """The sum of Kronecker products of the stack, the first factor's rows put together over the gates."""
    total = torch.zeros(matrix.shape, dtype=torch.float64)
    for term in matrix.term_list():
        first, *rest = [f.detach().double() for f in term.factors]
        for r in range(first.shape[1]):
            product = torch.cat(list(first[:, r]))
            for factor in rest:
                assert factor.shape[0] == 1
                product = torch.kron(product, factor[0, r])
            total += product
    if matrix.overlay is not None:
        height = matrix.overlay.values.shape[1]
        for (row, column), values in zip(matrix.overlay.index.tolist(), matrix.overlay.values.detach(), strict=True):
            total[row : row + height, column] += values.double()
    return total


def dense_like(layer: KRULSTM | KRUGRU) -> nn.LSTM | nn.GRU:
    kind = nn.LSTM if isinstance(layer, KRULSTM) else nn.GRU
    dense = kind(layer.input_size, layer.hidden_size, bidirectional=layer.bidirectional, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            own = getattr(layer, name)
            parameter.copy_(oracle(own) if isinstance(own, KroneckerMatrix) else own)
    return dense


def stirred(layer: nn.Module) -> nn.Module:
    """Overlays start at 0."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("overlay.values"):
                parameter.normal_()
    return layer


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", GATES)
def test_the_matrix_is_the_kronecker_sum_of_the_stack(kind: type[KRULSTM], name: str) -> None:
    layer = stirred(kind(5, 16, factors=spec_of(name, GATES[kind])))
    matrix = layer.weight_hh_l0
    assert isinstance(matrix, KroneckerMatrix)
    assert (matrix.gates, matrix.rows, len(matrix.structures)) == (GATES[kind], 16, 1)
    expected = oracle(matrix)
    torch.testing.assert_close(matrix.to_dense().detach().double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(7, 16)
    torch.testing.assert_close(matrix(x).detach(), x @ expected.float().T, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in matrix.parameters()) == matrix.structures[0].parameters


@pytest.mark.parametrize(
    ("kind", "name", "backend", "batch"),
    all_pairs(kind=tuple(GATES), name=tuple(SPECS), backend=("auto", "reference", "dense", "kernel"), batch=(1, 19)),
)
def test_outputs_and_gradients_are_those_of_the_dense_layer(
    kind: type[KRULSTM], name: str, backend: str, batch: int
) -> None:
    if backend == "kernel" and not backend_info()["compiled"]:
        pytest.skip("needs the compiled library")
    layer = stirred(kind(5, 16, bidirectional=True, factors=spec_of(name, GATES[kind]), backend=backend)).double()
    dense = dense_like(layer)
    x = torch.randn(6, batch, 5, dtype=torch.float64)
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(6, batch, 32, dtype=torch.float64)
    output, expected = layer(x)[0], dense(other)[0]
    torch.testing.assert_close(output, expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for suffix in ("l0", "l0_reverse"):
        matrix = getattr(layer, f"weight_hh_{suffix}")
        wanted = torch.autograd.grad(
            (matrix.to_dense() * getattr(dense, f"weight_hh_{suffix}").grad).sum(), list(matrix.parameters())
        )
        for parameter, grad in zip(matrix.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("name", ["low rank", "pair", "chain", "rows in common"])
def test_scales_of_stacked_gates(name: str) -> None:
    """One for every gate and product, beside the factors in common."""
    structure = replace(parse(spec_of(name, 4)).resolve(64, 16, gates=4), scaled=True)
    outputs, layer = [], KRULSTM(5, 16, factors={"weight_hh_l0": [structure]}).double()
    with torch.no_grad():
        for term in layer.weight_hh_l0.term_list():
            term.scale.normal_()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for backend in ("reference", "kernel" if backend_info()["compiled"] else "dense"):
        layer.backend = backend
        output = layer(x)[0]
        outputs.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], output)
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", SPECS)
def test_a_cell_streams_what_the_layer_computes(name: str) -> None:
    layer = stirred(KRULSTM(5, 16, factors=spec_of(name, 4)))
    cell = KRULSTMCell(5, 16, factors=spec_of(name, 4))
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        expected, state = layer(x)[0], None
        for t in range(4):
            state = cell(x[t], state)
            torch.testing.assert_close(state[0], expected[t])


def test_a_stream_follows_parameters_that_change() -> None:
    cell = KRULSTMCell(5, 16, factors=spec_of("chain", 4))
    x, state = torch.randn(2, 5), None
    with torch.no_grad():
        state = cell(x, state)
        cell(x, state)
        for term in cell.weight_hh.term_list():
            term.factors[-1].mul_(3)
        fresh = KRULSTMCell(5, 16, factors=spec_of("chain", 4))
        fresh.load_state_dict(cell.state_dict())
        torch.testing.assert_close(cell(x, state), fresh(x, state))


@pytest.mark.parametrize("name", ["low rank", "pair", "sum"])
def test_gradcheck(name: str) -> None:
    layer = stirred(KRUGRU(2, 16, factors=spec_of(name, 3), backend="auto")).double()
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]
        return output

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_one_structure_of_a_stack_stands_alone() -> None:
    stacked, single = parse("stacked:8x4,4x4").resolve(32, 16, 2), parse("8x4,4x4").resolve(32, 16)
    with pytest.raises(UsageError, match="stands alone"):
        KroneckerMatrix([stacked, single])
    with pytest.raises(UsageError, match="expected 4 structures"):
        KRULSTM(5, 16, factors={"weight_hh_l0": [stacked]})


def test_a_pickled_layer_comes_back() -> None:
    layer = KRULSTM(5, 16, factors=spec_of("pair", 4))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(again(x)[0], layer(x)[0])
