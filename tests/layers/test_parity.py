"""Every layer equals torch.nn's with the densified weights: outputs, final states, gradients, on every path."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from kruify.layers import KRUGRU, KRULSTM, KRURNN, KroneckerMatrix, KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.base import KRUBase
from kruify.ops import has_kernel

F64 = torch.float64
KINDS = {"rnn": (nn.RNN, KRURNN), "lstm": (nn.LSTM, KRULSTM), "gru": (nn.GRU, KRUGRU)}
SPEC = "2*(4x2,2x4)+8x1,1x8+diag+sparse:10%"
CASES = all_pairs(
    lambda kind, proj, backend, **_: not proj or (kind == "lstm" and backend != "kernel"),
    kind=tuple(KINDS),
    layers=(1, 2, 3),
    bidirectional=(False, True),
    bias=(False, True),
    proj=(0, 4),
    input_factors=(None, "auto"),
    form=("padded", "packed", "unbatched"),
    batch_first=(False, True),
    given=("no state", "state"),
    dtype=(F64, torch.float32),
    backend=("reference", "dense", "kernel", "auto"),
)


def pair(kind: str, backend: str = "auto", dtype: torch.dtype = F64, **options: object) -> tuple[nn.Module, KRUBase]:
    dense_class, kru_class = KINDS[kind]
    spec = "2*(4x2,2x2)+8x1,1x4+diag+sparse:10%" if options.get("proj_size") else SPEC
    kru = kru_class(5, 8, factors=spec, backend=backend, dtype=dtype, **options)
    options.pop("input_factors", None)
    dense = dense_class(5, 8, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in kru.parameters():
            parameter.normal_(std=0.5)
        for name, parameter in dense.named_parameters():
            weight = getattr(kru, name)
            parameter.copy_(weight.to_dense() if isinstance(weight, KroneckerMatrix) else weight)
    return dense, kru


def results(layer: nn.Module, x: torch.Tensor, form: str, state: object) -> list[torch.Tensor]:
    """Output, final states, and the gradient of x."""
    x = x.clone().requires_grad_()
    lengths = torch.tensor([4, 6, 1])
    given = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False) if form == "packed" else x
    output, final = layer(given, state)
    output = output.data if isinstance(output, PackedSequence) else output
    final = final if isinstance(final, tuple) else (final,)
    (output.square().sum() + sum(f.sin().sum() for f in final)).backward()
    return [output, *final, x.grad]


@pytest.mark.parametrize(
    "kind, layers, bidirectional, bias, proj, input_factors, form, batch_first, given, dtype, backend", CASES
)
def test_equals_torch(
    kind, layers, bidirectional, bias, proj, input_factors, form, batch_first, given, dtype, backend
) -> None:  # type: ignore[no-untyped-def]
    if backend == "kernel" and not has_kernel("cpu"):
        pytest.skip("the kernels are not compiled here")
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    if proj:
        options["proj_size"] = proj
    dense, kru = pair(kind, backend, dtype, input_factors=input_factors, **options)
    batch = () if form == "unbatched" else (3,)
    x = torch.randn((*batch, 6, 5) if batch_first else (6, *batch, 5), dtype=dtype)
    sizes = (proj or 8, 8) if kind == "lstm" else (8,)
    state = [torch.randn(layers * (1 + bidirectional), *batch, size, dtype=dtype) for size in sizes]
    hx = None if given == "no state" else tuple(state) if kind == "lstm" else state[0]
    found, expected = results(kru, x, form, hx), results(dense, x, form, hx)
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=0, atol=1e-12 if dtype == F64 else 1e-5)
    allowed = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found[-1], expected[-1], **allowed)
    for name, parameter in dense.named_parameters():
        weight = getattr(kru, name)
        if isinstance(weight, KroneckerMatrix):
            own = list(weight.parameters())
            wanted = torch.autograd.grad((weight.to_dense() * parameter.grad).sum(), own)
            torch.testing.assert_close([p.grad for p in own], list(wanted), **allowed)
        else:
            torch.testing.assert_close(weight.grad, parameter.grad, **allowed)


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
