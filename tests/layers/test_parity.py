"""Every layer equals torch.nn's with the densified weights: outputs, final states, gradients, on every path."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.layers import KRUGRU, KRULSTM, KRURNN, KroneckerMatrix, KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.base import KRUBase

F64 = torch.float64
KINDS = {"rnn": (nn.RNN, KRURNN), "lstm": (nn.LSTM, KRULSTM), "gru": (nn.GRU, KRUGRU)}
SPEC = "2*(4x2,2x4)+8x1,1x8+diag+sparse:10%"
GRID = [
    (kind, layers, bidirectional, bias, proj, mode)
    for kind, layers, bidirectional, bias, proj in itertools.product(
        KINDS, (1, 2), (False, True), (False, True), (0, 4)
    )
    for mode in ("time_first", "batch_first", "packed", "unbatched")
    if not proj or kind == "lstm"
]


def pair(kind: str, backend: str = "auto", **options: object) -> tuple[nn.Module, KRUBase]:
    dense_class, kru_class = KINDS[kind]
    spec = "2*(4x2,2x2)+8x1,1x4+diag+sparse:10%" if options.get("proj_size") else SPEC
    kru = kru_class(5, 8, factors=spec, backend=backend, dtype=F64, **options)
    dense = dense_class(5, 8, dtype=F64, **options)
    with torch.no_grad():
        for parameter in kru.parameters():
            parameter.normal_(std=0.5)
        for name, parameter in dense.named_parameters():
            weight = getattr(kru, name)
            parameter.copy_(weight.to_dense() if isinstance(weight, KroneckerMatrix) else weight)
    return dense, kru


def run(layer: nn.Module, mode: str, state: object) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 5, dtype=F64, generator=generator).requires_grad_()
    if mode == "packed":
        packed = pack_padded_sequence(x, torch.tensor([4, 6, 1]), enforce_sorted=False)
        output, final = layer(packed, state)
        output = output.data
    elif mode == "batch_first":
        output, final = layer(x.transpose(0, 1), state)
        output = output.transpose(0, 1)
    elif mode == "unbatched":
        if state is not None:
            state = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
        output, final = layer(x[:, 0], state)
    else:
        output, final = layer(x, state)
    return output, list(final) if isinstance(final, tuple) else [final], x


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize(("kind", "layers", "bidirectional", "bias", "proj", "mode"), GRID)
def test_equals_torch(
    kind: str, layers: int, bidirectional: bool, bias: bool, proj: int, mode: str, backend: str
) -> None:
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": mode == "batch_first"}
    if proj:
        options["proj_size"] = proj
    dense, kru = pair(kind, backend, **options)
    sizes = (proj or 8, 8) if kind == "lstm" else (8,)
    rows = layers * (1 + bidirectional)
    state = tuple(torch.randn(rows, 3, size, dtype=F64) for size in sizes)
    for hx in (None, state if kind == "lstm" else state[0]):
        output, final, x = run(kru, mode, hx)
        expected, expected_final, expected_x = run(dense, mode, hx)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-12)
        (output.square().sum() + sum(f.sin().sum() for f in final)).backward()
        (expected.square().sum() + sum(f.sin().sum() for f in expected_final)).backward()
        torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-10, atol=1e-10)
    for name, parameter in dense.named_parameters():
        if not name.startswith("weight_hh"):
            torch.testing.assert_close(getattr(kru, name).grad, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, backend: str) -> None:
    _, kru = pair(kind, backend)
    names, parameters = zip(*kru.named_parameters(), strict=True)
    x = torch.randn(3, 2, 5, dtype=F64)

    def output(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(kru, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(output, tuple(p.detach().requires_grad_() for p in parameters))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dense_class", "kru_class"),
    [(nn.RNNCell, KRURNNCell), (nn.LSTMCell, KRULSTMCell), (nn.GRUCell, KRUGRUCell)],
)
def test_cells_equal_torch(dense_class: type, kru_class: type, bias: bool) -> None:
    kru = kru_class(5, 8, bias, factors=SPEC, input_factors="8x5", dtype=F64)
    dense = dense_class(5, 8, bias, dtype=F64)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            weight = getattr(kru, name)
            parameter.copy_(weight.to_dense() if isinstance(weight, KroneckerMatrix) else weight)
    for shape in ((3, 5), (5,)):
        x = torch.randn(shape, dtype=F64)
        state = None
        for _ in range(3):
            state = kru(x, state)
        expected = None
        for _ in range(3):
            expected = dense(x, expected)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)


def test_relu_and_dropout_follow_torch() -> None:
    dense, kru = pair("rnn", "reference", nonlinearity="relu", num_layers=2)
    torch.testing.assert_close(kru(torch.ones(4, 2, 5, dtype=F64)), dense(torch.ones(4, 2, 5, dtype=F64)))
    kru = KRUGRU(5, 8, 2, dropout=1.0, factors="auto", bias=False, backend="reference")
    assert kru(torch.randn(4, 2, 5))[0].abs().max() == 0  # everything between the layers was dropped
    kru.eval()
    assert kru(torch.randn(4, 2, 5))[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sequences_and_batches(kind: str) -> None:
    _, kru = pair(kind)
    assert kru(torch.zeros(0, 2, 5, dtype=F64))[0].shape == (0, 2, 8)
    assert kru(torch.zeros(3, 0, 5, dtype=F64))[0].shape == (3, 0, 8)
