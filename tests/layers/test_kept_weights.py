"""Weights that are kept between calls without derivatives must not outlive a change of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kruify.layers import KRUGRU, KRULSTM
from kruify.ops import has_kernel


def fresh(layer: KRUGRU | KRULSTM, x: Tensor) -> Tensor:
    twin = type(layer)(4, 16, factors="2*(2x2)+sparse:10%", backend="reference").double()
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        return twin(x)[0]


def train(layer: KRUGRU | KRULSTM, x: Tensor, fused: bool) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    layer(x)[0].square().sum().backward()
    optimizer.step()


def load(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    state = {n: t * 2 if t.is_floating_point() else t for n, t in layer.state_dict().items()}
    layer.load_state_dict(state)


def move_overlay(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    index = layer.weight_hh_l0.overlay.index
    index[:, 1] = (index[:, 1] + 1) % 16


@pytest.mark.parametrize("backend", ["dense", "kernel"])
@pytest.mark.parametrize("kind", [KRUGRU, KRULSTM])
@pytest.mark.parametrize(
    "change",
    [lambda m, x: train(m, x, True), lambda m, x: train(m, x, False), load, move_overlay],
    ids=["fused step", "step", "load", "overlay"],
)
def test_a_change_is_seen(
    backend: str, kind: type[KRUGRU] | type[KRULSTM], change: Callable[[KRUGRU | KRULSTM, Tensor], None]
) -> None:
    if backend == "kernel" and not has_kernel("cpu"):
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    layer = kind(4, 16, factors="2*(2x2)+sparse:10%", backend=backend).double()
    torch.nn.init.normal_(layer.weight_hh_l0.overlay.values)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)[0]
    change(layer, x)
    with torch.no_grad():
        after = layer(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(layer, x), rtol=1e-10, atol=1e-12)
