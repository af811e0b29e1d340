"""What users of torch.nn's layers may do with ours, too. The oracle is torch.nn on the dense weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kruify import layers
from kruify.errors import UsageError
from kruify.layers import KRU, KRUGRU, KRULSTM, KroneckerMatrix

KINDS = ["LSTM", "GRU", "RNN"]
BACKENDS = ["auto", "kernel", "dense", "reference"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layers.KRULSTM(4, 8, backend="kernels"), "'auto', 'reference', 'dense' or 'kernel', got 'kernels'"),
        (lambda: layers.KRUGRU(4, 8, backend=None), "'auto', 'reference', 'dense' or 'kernel', got 'None'"),
        (lambda: KRU(4, 8, backend="cuda"), "'auto', 'kernel' or 'reference', got 'cuda'"),
        (lambda: KRU(4, 8, nonlinearity="sigmoid"), "nonlinearity must be 'modrelu', got 'sigmoid'"),
        (lambda: KRU(4, 8, complex_state=False, nonlinearity="gelu"), "'modrelu', 'tanh' or 'relu'"),
        (lambda: layers.KRURNNCell(4, 8, nonlinearity="sigmoid"), "'tanh' or 'relu', got 'sigmoid'"),
        (lambda: layers.KRULSTMCell(4, 8, nonlinearity="relu"), "nonlinearity must be 'tanh', got 'relu'"),
        (lambda: layers.KRUGRU(4, 8, nonlinearity="relu"), "nonlinearity must be 'tanh', got 'relu'"),
        (lambda: layers.KRUGRU(4, 8, proj_size=2), "proj_size belongs to an LSTM"),
    ],
)
def test_constructors_name_what_they_know(make: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert words in str(caught.value)


def scaled(cell: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(cell.parameters()) * 3, cell.parameters())


def exchanged(cell: nn.Module) -> None:
    for p in cell.parameters():
        p.data = p.data * 2


def there_and_back(cell: nn.Module) -> None:
    cell.double()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(2)
    cell.float()


@pytest.mark.parametrize(
    ("kind", "factors", "change"),
    all_pairs(
        kind=KINDS,
        factors=("stacked:1*({0}x1,1x4)", "stacked:2*({1}x2,2x2)+sparse:10%:1", "2x2", "diag"),
        change=(scaled, exchanged, there_and_back),
    ),
)
def test_a_cell_follows_parameters_that_are_exchanged(kind: str, factors: str, change: Any) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    spec = factors.format(4 * gates, 2 * gates)
    cell = getattr(layers, f"KRU{kind}Cell")(4, 4, factors=spec if gates > 1 else spec.removeprefix("stacked:"))
    x, h = torch.randn(2, 4), torch.randn(2, 4)
    state = (h, h) if kind == "LSTM" else h
    with torch.no_grad():
        for _ in range(2):
            before = cell(x, state)
        change(cell)
        found, wanted = cell(x, state), copy.deepcopy(cell)(x, state)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(before[0], found[0])


def replica_of(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes: modules without parameters, whose weights are plain tensors."""
    new = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            new._parameters[name] = None
        else:
            setattr(new, name, parameter.clone())
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else replica_of(child)
    return new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factors", ["2x2", "stacked:2*auto+sparse:5%", "diag", "sparse:20%:1"])
def test_replicas_of_data_parallel(backend: str, factors: str) -> None:
    layer = KRULSTM(3, 16, factors=factors, backend=backend)  # type: ignore[arg-type]
    x = torch.randn(4, 2, 3)
    output, wanted = replica_of(layer)(x)[0], layer(x)[0]
    torch.testing.assert_close(output, wanted)
    parameters = list(layer.parameters())
    for actual, want in zip(
        torch.autograd.grad(output.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(actual, want)


def test_replicas_of_a_kru_and_of_cells() -> None:
    x = torch.randn(4, 2, 3)
    for module, given in ((KRU(3, 8), x), (KRU(3, 8, complex_state=False), x), (layers.KRUGRUCell(3, 8), x[0])):
        torch.testing.assert_close(replica_of(module)(given), module(given))


@pytest.mark.parametrize(
    ("kind", "backend", "batch_first"),
    all_pairs(kind=("GRU", "RNN", "LSTM"), backend=BACKENDS, batch_first=(False, True)),
)
def test_outputs_may_be_changed_in_place(kind: str, backend: str, batch_first: bool) -> None:
    layer = getattr(layers, f"KRU{kind}")(3, 8, backend=backend, batch_first=batch_first)
    if kind == "LSTM":
        layer = layer.double()  # torch's oneDNN, which has no float64, keeps the output itself
    dtype = next(layer.parameters()).dtype
    dense = getattr(nn, kind)(3, 8, batch_first=batch_first, dtype=dtype)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            own = getattr(layer, name)
            parameter.copy_(own.to_dense() if isinstance(own, KroneckerMatrix) else own)
    x = torch.randn(4, 2, 3, dtype=dtype)
    grads = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        output, state = module(leaf)
        output.mul_(2)
        (output.square().sum() + (state[1] if kind == "LSTM" else state).mul(3).sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTM"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_final_states_may_be_changed_in_place(kind: str, backend: str) -> None:
    layer, grads = getattr(layers, f"KRU{kind}")(3, 8, backend=backend), []
    for factor in (1.0, 3.0):
        x = torch.ones(4, 2, 3, requires_grad=True)
        state = layer(x)[1][1] if kind == "LSTM" else layer(x)[1]
        grads.append(torch.autograd.grad(state.mul_(factor).sum(), x)[0] / factor)
    torch.testing.assert_close(*grads)


def test_a_cell_says_what_its_state_is() -> None:
    with pytest.raises(UsageError, match="the state must be a tensor"):
        layers.KRUGRUCell(3, 8)(torch.ones(2, 3), (torch.ones(2, 8),) * 2)


def test_outputs_of_a_kru_may_be_changed_in_place() -> None:
    layer = KRU(3, 8)
    output, _ = layer(torch.randn(4, 2, 3))
    output.mul_(2).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_in_training(kind: str, backend: str) -> None:
    """As in torch.nn: an empty output with a graph, gradients of zeros."""
    layer = getattr(layers, f"KRU{kind}")(3, 8, 2, bidirectional=True, backend=backend)
    output, state = layer(torch.zeros(5, 0, 3))
    assert output.shape == (5, 0, 16) and output.requires_grad
    for s in state if isinstance(state, tuple) else (state,):
        assert s.shape == (4, 0, 8)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("nested", [False, True])
def test_a_complex_kru_changes_its_precision(nested: bool) -> None:
    layer = KRU(3, 8)
    model = nn.Sequential(layer) if nested else layer
    x = torch.randn(4, 2, 3)
    wanted = layer(x)[0]
    weight = layer.weight_ih_l0.detach().clone()
    for change in (model.double, model.float, lambda: model.to(torch.float64)):
        change()
        assert {p.dtype for p in layer.parameters()} in (
            {torch.float32, torch.complex64},
            {torch.float64, torch.complex128},
        )
        torch.testing.assert_close(layer.weight_ih_l0.detach().to(torch.complex64), weight)  # nothing imaginary lost
        dtype = layer.bias_l0.dtype
        torch.testing.assert_close(layer(x.to(dtype))[0].float(), wanted, rtol=1e-4, atol=1e-5)
    for refused in (model.half, lambda: model.to(torch.bfloat16), lambda: model.to(torch.complex64)):
        with pytest.raises(UsageError, match="float32 or float64"):
            refused()
    assert layer.weight_ih_l0.dtype == torch.complex128
    assert KRU(3, 8, complex_state=False).double().weight_ih_l0.dtype == torch.float64


def test_a_packed_batch_of_equal_lengths_is_a_padded_one() -> None:
    x = torch.randn(4, 3, 5)
    for backend in BACKENDS:
        layer = KRUGRU(5, 8, backend=backend)  # type: ignore[arg-type]
        packed, state = layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 4])))
        output, final = layer(x)
        torch.testing.assert_close(packed.data, output.flatten(0, 1))
        torch.testing.assert_close(state, final)
