"""A default device (torch.set_default_device) is for tensors of the user: layers work on that of their input."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from kruify.layers import KRU, KRUGRU, KRULSTM, KRURNN, KRULSTMCell


@pytest.mark.parametrize(
    ("layer", "backend", "training"),
    all_pairs(
        layer=(KRULSTM, KRUGRU, KRURNN), backend=("auto", "kernel", "dense", "reference"), training=(False, True)
    ),
)
def test_layers(layer, backend, training) -> None:  # type: ignore[no-untyped-def]
    rnn = layer(5, 16, num_layers=2, bidirectional=True, factors="4x4,4x4+diag+sparse:5%", backend=backend)
    same(rnn, torch.randn(6, 3, 5), training)
    same(rnn, pack_sequence([torch.randn(4, 5), torch.randn(2, 5)]), training)


@pytest.mark.parametrize("backend", ["auto", "kernel", "reference"])
@pytest.mark.parametrize("complex_state", [False, True])
def test_kru(backend, complex_state) -> None:  # type: ignore[no-untyped-def]
    same(KRU(5, 16, complex_state=complex_state, backend=backend), torch.randn(6, 3, 5), True)


@pytest.mark.parametrize("training", [False, True])
def test_cells(training) -> None:  # type: ignore[no-untyped-def]
    same(KRULSTMCell(5, 16), torch.randn(3, 5), training)


def test_an_overlay_is_spread_on_any_device() -> None:
    with torch.device("meta"):
        layer = KRULSTM(5, 16, factors="4x4,4x4+sparse:5%")
    assert layer.weight_hh_l0.overlay.index.is_meta


def same(layer: nn.Module, x: object, training: bool) -> None:
    with torch.set_grad_enabled(training):
        wanted = layer(x)
        with torch.device("meta"):
            found = layer(x)
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert torch.equal(a, b)


def flat(outputs: object) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = [outputs.data] if isinstance(outputs, nn.utils.rnn.PackedSequence) else outputs
    return [t for part in parts for t in flat(part)]  # type: ignore[attr-defined]
