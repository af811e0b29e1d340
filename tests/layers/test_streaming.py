"""Step by step in no_grad, where layers and cells keep what they can from call to call: after every way in which
weights can change the next step is that of a module that has never been called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kruify import layers

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def make(name: str, spec: str, backend: str = "auto") -> nn.Module:
    options: dict[str, Any] = {"factors": spec}
    if name in ("KRU", "KRU real"):
        return layers.KRU(3, 16, complex_state=name == "KRU", backend=backend, factors=spec)  # type: ignore[arg-type]
    kind = name.removeprefix("KRU").removesuffix("Cell")
    if spec.startswith("stacked") and GATES[kind] == 1:
        options["factors"] = spec.removeprefix("stacked:").replace("{0}", "16")
    options["factors"] = options["factors"].replace("{0}", str(16 * GATES[kind]))
    if not name.endswith("Cell"):
        options["backend"] = backend
    module: nn.Module = getattr(layers, name)(3, 16, **options)
    return module


def start(name: str, batch: int, dtype: torch.dtype) -> Any:
    if name == "KRU":
        return torch.zeros(1, batch, 16, dtype=dtype.to_complex())
    shape = (batch, 16) if name.endswith("Cell") else (1, batch, 16)
    state = torch.zeros(shape, dtype=dtype)
    return (state, state) if "LSTM" in name else state


def run(module: nn.Module, name: str, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of one call a step."""
    state, outputs = start(name, inputs.shape[1], inputs.dtype), []
    for x in inputs:
        if name.endswith("Cell"):
            state = module(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        else:
            output, state = module(x.unsqueeze(0), state)
            outputs.append(output[0])
    return outputs


def step(module: nn.Module, name: str, optimizer: str, **options: Any) -> None:
    chosen = getattr(torch.optim, optimizer)(module.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        run(module, name, torch.randn(2, 2, 3))[-1].square().sum().backward()
    chosen.step()


def exchange(module: nn.Module, name: str) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.5


def in_place(module: nn.Module, name: str) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)  # counts no version


def load(module: nn.Module, name: str, assign: bool = False) -> None:
    state = {n: t * 1.5 if t.is_floating_point() or t.is_complex() else t for n, t in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


def there_and_back(module: nn.Module, name: str) -> None:
    module.double()
    run(module, name, torch.randn(2, 2, 3, dtype=torch.float64))
    in_place(module, name)
    module.float()


def one_replaced(module: nn.Module, name: str) -> None:
    for child in module.modules():
        for own, parameter in list(child._parameters.items()):
            if parameter is not None:
                setattr(child, own, nn.Parameter(parameter.detach() * 1.5))


def through_a_vector(module: nn.Module, name: str) -> None:
    if any(p.is_complex() for p in module.parameters()):
        return exchange(module, name)  # torch has no vector of real and complex numbers
    return vector_to_parameters(parameters_to_vector(module.parameters()) * 1.5, module.parameters())


CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "SGD": lambda module, name: step(module, name, "SGD"),
    "AdamW, fused": lambda module, name: step(
        module, name, "AdamW", fused=not name.startswith("KRU ") and name != "KRU"
    ),
    "p.data =": exchange,
    "p.data.mul_": in_place,
    "load_state_dict": load,
    "load_state_dict, assign": lambda module, name: load(module, name, assign=True),
    "double and back": there_and_back,
    "vector_to_parameters": through_a_vector,
    "new parameters": one_replaced,
}
NAMES = [*(f"KRU{kind}" for kind in GATES), *(f"KRU{kind}Cell" for kind in GATES), "KRU", "KRU real"]
SPECS = ["4x4", "2x2", "2*(4x4)+diag", "stacked:2*({0}x1,1x16)", "4x4+sparse:10%"]


def has(name: str, spec: str, **_: Any) -> bool:
    return spec in ("4x4", "2x2") or name in NAMES[:6]


CASES = all_pairs(has, name=NAMES, spec=SPECS, change=tuple(CHANGES), backend=("auto", "kernel", "dense"))


@pytest.mark.parametrize(("name", "spec", "change", "backend"), CASES)
def test_a_stream_follows_its_weights(name: str, spec: str, change: str, backend: str) -> None:
    backend = "auto" if name in ("KRU", "KRU real") else backend
    torch.manual_seed(0)
    module, inputs = make(name, spec, backend), torch.randn(4, 2, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        before = run(module, name, inputs)
        CHANGES[change](module, name)
        found = run(module, name, inputs)
    fresh = make(name, spec, "reference")
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(found, run(fresh, name, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[-1], before[-1])
