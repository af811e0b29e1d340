"""Nothing that is kept between calls may outlive a change of the parameters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from all_pairs import all_pairs
from torch import Tensor

from kruify.layers import KRUGRU, KRULSTM, KRULSTMCell
from kruify.layers.storage import mark
from kruify.ops import has_kernel


def fresh(layer: KRUGRU | KRULSTM, x: Tensor) -> Tensor:
    twin = type(layer)(4, 16, factors="2*(2x2)+sparse:10%", backend="reference").double()
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        return twin(x)[0]


def step(layer: KRUGRU | KRULSTM, x: Tensor, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    layer(x)[0].square().sum().backward()
    optimizer.step()


def fused_step(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    step(layer, x, fused=True)


def load(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    state = {n: t * 2 if t.is_floating_point() else t for n, t in layer.state_dict().items()}
    layer.load_state_dict(state)


def assign(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    state = {n: t * 2 if t.is_floating_point() else t for n, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def through_data(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.data.mul_(2)  # counts no version


def in_inference_mode(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)
    step(layer, x)  # nothing made in inference mode may reach the backward pass


def move_overlay(layer: KRUGRU | KRULSTM, x: Tensor) -> None:
    index = layer.weight_hh_l0.overlay.index
    index[:, 1] = (index[:, 1] + 1) % 16


@pytest.mark.parametrize(
    ("backend", "kind", "change"),
    all_pairs(
        backend=("dense", "kernel"),
        kind=(KRUGRU, KRULSTM),
        change=(fused_step, step, load, assign, move_overlay, through_data, in_inference_mode),
    ),
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


class TestInt8:
    """What is packed in eight bits."""

    @staticmethod
    def layer(factors: str | None) -> KRULSTM:
        layer = KRULSTM(4, 16, factors=factors or {})
        mark(layer, {"weight_ih_l0": "int8", "weight_hh_l0": "int8"})
        return layer

    @pytest.mark.parametrize("change", [fused_step, step, load, assign, move_overlay, through_data, in_inference_mode])
    def test_a_change_is_seen(self, change: Callable[[KRUGRU | KRULSTM, Tensor], None]) -> None:
        layer, twin = (self.layer("3*(16x1,1x16)+sparse:10%") for _ in range(2))
        torch.nn.init.normal_(layer.weight_hh_l0.overlay.values)
        x = torch.randn(5, 2, 4)
        with torch.no_grad():
            before = layer(x)[0]
        change(layer, x)
        twin.load_state_dict(layer.state_dict())
        with torch.no_grad():
            after = layer(x)[0]
            assert not torch.allclose(before, after)
            assert torch.equal(after, twin(x)[0])

    def test_a_layer_that_leaves_float32_or_is_marked_anew_leaves_integers(self) -> None:
        layer, x = self.layer("3*(16x1,1x16)"), torch.randn(5, 2, 4)
        with torch.no_grad():
            integers = layer(x)[0]
            double = layer.double()(x.double())[0]
            assert torch.equal(layer.float()(x)[0], integers)
            mark(layer, {})
            floats = layer(x)[0]
            torch.testing.assert_close(double.float(), floats)
            mark(layer, {"weight_ih_l0": "int8"})
            assert torch.equal(layer(x)[0], floats) and not torch.equal(integers, floats)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_have_their_own(self, copied: Callable[[KRULSTM], KRULSTM]) -> None:
        layer, x = self.layer(None), torch.randn(5, 2, 4)
        with torch.no_grad():
            before = layer(x)[0]
            twin = copied(layer)
            for parameter in layer.parameters():
                parameter.mul_(2)
            assert torch.equal(twin(x)[0], before) and not torch.allclose(layer(x)[0], before)

    @pytest.mark.parametrize("factors", [{}, "3*(16x1,1x16)"])
    def test_what_is_kept_ends_with_the_layer(self, factors: Any) -> None:
        layer = KRULSTM(4, 16, 2, bidirectional=True, factors=factors)
        mark(layer, {full: "int8" for name in ("weight_ih", "weight_hh") for full in suffixed(name)})
        with torch.no_grad():
            layer(torch.randn(5, 2, 4))
        parameters = [weakref.ref(p) for p in layer.parameters()]
        del layer
        gc.collect()
        assert not any(reference() is not None for reference in parameters)


def suffixed(name: str) -> list[str]:
    return [f"{name}_l{k}{end}" for k in (0, 1) for end in ("", "_reverse")]


def test_functional_transforms_reach_the_dense_path() -> None:
    layer = KRULSTM(4, 16, factors="auto", backend="dense").double()
    x, parameters = torch.randn(5, 2, 4, dtype=torch.float64), dict(layer.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].sum())(parameters)
    wanted = torch.autograd.grad(layer(x)[0].sum(), list(parameters.values()))
    for actual, want in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("spec", ["2x2", "auto"])
def test_a_cell_sees_changes_that_count_no_version(spec: str) -> None:
    cell = KRULSTMCell(3, 16, factors=spec)
    x, state = torch.randn(2, 3), (torch.randn(2, 16), torch.randn(2, 16))
    with torch.no_grad():
        before = [cell(x, state)[0] for _ in range(2)]
        for parameter in cell.parameters():
            parameter.data.mul_(2)
        after = cell(x, state)[0]
    assert not torch.allclose(before[1], after)
    torch.testing.assert_close(after, cell(x, state)[0])  # with derivatives: nothing kept


def test_a_parametrised_cell_is_computed_anew() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    cell = KRULSTMCell(3, 16, factors="auto")
    torch.nn.utils.parametrize.register_parametrization(cell, "weight_ih", Doubled())
    x, state = torch.randn(2, 3), (torch.randn(2, 16), torch.randn(2, 16))
    with torch.no_grad():
        before = [cell(x, state)[0] for _ in range(2)]
        cell.parametrizations.weight_ih.original.mul_(3)
        after = cell(x, state)[0]
    assert not torch.allclose(before[1], after)
    torch.testing.assert_close(after, cell(x, state)[0])
