"""Weights that are computed from other parameters: pruning, weight norm, spectral norm, parametrizations, on what is
dense and on what is inside a Kronecker matrix. The oracle is a plain layer with the computed numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kruify import layers
from kruify.layers import KroneckerMatrix

F64 = torch.float64
NEW = "new weight norm"
SPEC = "2*(4x4)+diag+sparse:10%"


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


WAYS: dict[str, Callable[[nn.Module, str], Any]] = {
    "pruning": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "pruned twice": lambda m, n: prune.random_unstructured(prune.l1_unstructured(m, n, 0.3), n, 0.3),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "parametrized": lambda module, name: parametrize.register_parametrization(module, name, Halved()),
    NEW: parametrizations.weight_norm,
}


def holder(module: nn.Module, part: str) -> tuple[nn.Module, str]:
    """The submodule and the name in it."""
    matrix: Any = next(child for child in module.children() if isinstance(child, KroneckerMatrix))
    return {
        "factor": (matrix.terms[0].factors, "0"),
        "diagonal": (matrix, "diagonal"),
        "values": (matrix.overlay, "values"),
        "input": (module, "weight_ih" if hasattr(module, "weight_ih") else "weight_ih_l0"),
    }[part]


def make(name: str, options: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = getattr(layers, name)(3, 16, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def output(module: nn.Module, x: Tensor) -> Tensor:
    found = module(x)
    return found[0] if isinstance(found, tuple) else found


def as_computed(module: nn.Module, plain: nn.Module, part: str) -> None:
    """Gives `plain` the numbers of `module`, computed ones included."""
    (place, name), (target, _) = holder(module, part), holder(plain, part)
    with torch.no_grad():
        for full, parameter in plain.named_parameters():
            source = dict(module.named_parameters()).get(full)
            if source is not None:
                parameter.copy_(source)
        getattr(target, name).copy_(getattr(place, name))


def parts_of(module: Any) -> tuple[str, ...]:
    name, options = module
    if name == "KRU":
        return "factor", "input"
    return ("factor", "values", "input", *(() if "stacked" in options["factors"] else ("diagonal",)))


CASES = all_pairs(
    # torch cannot parametrise an attribute that is called "values".
    lambda module, part, way: part in parts_of(module) and (part != "values" or way not in ("parametrized", NEW)),
    module=(
        *[(f"KRU{kind}", {"factors": SPEC, "backend": b}) for kind, b in (("LSTM", "kernel"), ("LSTM", "dense"),
          ("GRU", "kernel"), ("GRU", "dense"), ("RNN", "kernel"), ("RNN", "reference"))],
        *[(f"KRU{kind}Cell", {"factors": SPEC}) for kind in ("LSTM", "GRU", "RNN")],
        ("KRU", {"complex_state": False}),
        ("KRULSTM", {"factors": "stacked:2*(16x4,4x4)+sparse:10%", "backend": "auto"}),
    ),
    part=("factor", "diagonal", "values", "input"),
    way=tuple(WAYS),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "part", "way"), CASES)
def test_a_computed_weight_is_computed_anew_before_every_call(module: Any, part: str, way: str) -> None:
    name, options = module
    x = torch.randn(5, 3, dtype=F64) if name.endswith("Cell") else torch.randn(4, 5, 3, dtype=F64)
    layer, plain = make(name, options).eval(), make(name, options).eval()
    before = output(layer, x).detach()
    WAYS[way](*holder(layer, part))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # the second time with other numbers
        found = output(layer, x)
        as_computed(layer, plain, part)
        torch.testing.assert_close(found, output(plain, x), rtol=1e-9, atol=1e-11)
        optimizer.zero_grad()
        found.square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        with torch.no_grad():
            for _ in range(2):
                streamed = output(layer, x)
            as_computed(layer, plain, part)
            torch.testing.assert_close(streamed, output(plain, x), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, before)


def test_removed_pruning_leaves_a_plain_layer() -> None:
    cell, x = layers.KRUGRUCell(3, 16, factors="4x4"), torch.randn(5, 3)
    factors = cell.weight_hh.terms[0].factors
    prune.l1_unstructured(factors, "0", 0.5)
    pruned = cell(x)
    prune.remove(factors, "0")
    assert set(cell.state_dict()) == set(layers.KRUGRUCell(3, 16, factors="4x4").state_dict())
    torch.testing.assert_close(cell(x), pruned)
    with torch.no_grad():
        torch.testing.assert_close(cell(x), pruned)
