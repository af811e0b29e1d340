"""Derivatives that the kernels have no formula for: forward mode, torch.func, batched gradients.

The oracle is torch.nn on the dense weights, in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn
from torch.autograd import forward_ad

from kruify import layers
from kruify.layers import KRU, KroneckerMatrix

F64 = torch.float64
SPECS = ["4x4,2x2", "stacked:2*auto+sparse:6%:1"]
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {}),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 4, "bidirectional": True, "num_layers": 2}),
]
BACKENDS = ["auto", "kernel", "dense", "reference"]


def pair(kind: str, factors: str = "4x4,2x2", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A KRU layer or cell and torch.nn's with the same weights, in float64."""
    factors = factors if kind.startswith(("LSTM", "GRU")) and not options.get("proj_size") else "auto"
    backend = {"backend": options.pop("backend")} if "backend" in options else {}
    layer = getattr(layers, f"KRU{kind}")(3, 8, factors=factors, dtype=F64, **options, **backend)
    dense = getattr(nn, kind)(3, 8, dtype=F64, **options)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            own = getattr(layer, name)
            parameter.copy_(own.to_dense() if isinstance(own, KroneckerMatrix) else own)
    return layer, dense


def first(output: Any) -> Tensor:
    return first(output[0]) if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    ("layer", "factors", "backend"),
    all_pairs(
        lambda layer, factors, backend: backend != "kernel" or "proj_size" not in layer[1],
        layer=LAYERS, factors=SPECS, backend=BACKENDS,
    ),
)  # fmt: skip
def test_forward_mode(layer: tuple[str, dict[str, Any]], factors: str, backend: str) -> None:
    kind, options = layer
    kru, dense = pair(kind, factors, **options, backend=backend)
    x, v = torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64)
    wanted = torch.autograd.functional.jvp(lambda x: first(dense(x)), x, v)[1]  # twice reverse
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.jvp(lambda x: first(kru(x)), (x,), (v,))[1], wanted)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            found = forward_ad.unpack_dual(first(kru(forward_ad.make_dual(x, v)))).tangent
            assert found is not None
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("factors", SPECS)
def test_forward_mode_of_cells(kind: str, factors: str) -> None:
    cell, dense = pair(kind, factors)
    x, v = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    h = torch.randn(2, 8, dtype=F64)
    state = (h, h) if kind == "LSTMCell" else h
    wanted = torch.autograd.functional.jvp(lambda x: first(dense(x, state)), x, v)[1]
    torch.testing.assert_close(torch.func.jvp(lambda x: first(cell(x, state)), (x,), (v,))[1], wanted)
    with torch.no_grad():
        cell(x, state)  # what is kept for streaming may not answer
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(first(cell(forward_ad.make_dual(x, v), state))).tangent
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("complex_state", [True, False])
def test_forward_mode_of_the_kru(complex_state: bool, backend: str) -> None:
    layer = KRU(3, 8, complex_state=complex_state, dtype=F64, backend=backend)  # type: ignore[arg-type]
    x, v = torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64)
    step = 1e-6
    wanted = (layer(x + step * v)[0] - layer(x - step * v)[0]) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))[1], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_transforms_of_torch_func(kind: str, backend: str) -> None:
    layer, dense = pair(kind, backend=backend)
    x = torch.randn(3, 2, 3, dtype=F64)

    def loss(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: first(module(x)).sin().sum()

    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(dense)(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss(layer))(x), wanted)
    torch.testing.assert_close(torch.func.jacrev(loss(layer))(x), wanted)
    torch.testing.assert_close(torch.func.jacfwd(loss(layer))(x), wanted)
    torch.testing.assert_close(torch.func.hessian(loss(layer))(x), torch.autograd.functional.hessian(loss(dense), x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("factors", SPECS)
def test_gradients_of_each_sample(kind: str, factors: str) -> None:
    layer, _ = pair(kind, factors)
    x, parameters = torch.randn(4, 5, 3, dtype=F64), dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(torch.func.functional_call(layer, parameters, (x.unsqueeze(1),))).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for sample in range(x.shape[1]):
        wanted = torch.autograd.grad(loss(parameters, x[:, sample]), list(parameters.values()))
        for actual, want in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(actual[sample], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batched_gradients(kind: str, backend: str) -> None:
    layer, _ = pair(kind, "4x4,2x2", backend=backend, bidirectional=True)
    if backend == "dense" and kind == "LSTM":
        layer = layer.float()  # torch's own kernel in one node
    dtype = next(layer.parameters()).dtype
    output = first(layer(torch.randn(3, 2, 3, dtype=dtype)))
    directions = torch.randn(4, *output.shape, dtype=dtype)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(output, parameters, directions, is_grads_batched=True, retain_graph=True)
    for k, direction in enumerate(directions):
        wanted = torch.autograd.grad(output, parameters, direction, retain_graph=True)
        for actual, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual[k], want, rtol=1e-4, atol=1e-5)


def test_batched_gradients_of_a_kronecker_input_matrix_and_a_kru() -> None:
    for layer in (layers.KRUGRU(4, 8, input_factors="auto", dtype=F64), KRU(4, 8, dtype=F64)):
        output = first(layer(torch.randn(3, 2, 4, dtype=F64)))
        directions, parameters = torch.randn(2, *output.shape, dtype=F64), list(layer.parameters())
        found = torch.autograd.grad(output, parameters, directions, is_grads_batched=True, retain_graph=True)
        for k, direction in enumerate(directions):
            wanted = torch.autograd.grad(output, parameters, direction, retain_graph=True)
            for actual, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(actual[k], want)
