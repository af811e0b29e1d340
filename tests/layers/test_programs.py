"""Layers and cells as recorded programs: torch.export with a dynamic batch, torch.jit.trace; what no tool can record
says so. The oracle is the module itself at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn
from torch.export import Dim, export

from kruify import layers
from kruify.errors import KruifyError
from kruify.layers import KRU, KRUGRU

BACKENDS = ("auto", "kernel", "dense", "reference")
KINDS = ("LSTM", "GRU", "RNN")


def compare(program: Any, module: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("kind", "backend", "grad", "shape"),
    all_pairs(
        kind=KINDS, backend=BACKENDS[:3], grad=(True, False),
        shape=({}, {"batch_first": True, "factors": "2*(4x4)+sparse:5%"}, {"num_layers": 2, "bidirectional": True}),
    ),
)  # fmt: skip
def test_an_exported_layer_runs_at_other_batch_sizes(kind: str, backend: str, shape: Any, grad: bool) -> None:
    layer = getattr(layers, f"KRU{kind}")(3, 16, backend=backend, **{"factors": "4x4", **shape}).eval()
    axis = 0 if layer.batch_first else 1
    with torch.set_grad_enabled(grad):
        program = export(layer, (torch.randn(2, 2, 3),), dynamic_shapes=({axis: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 5, 17):
        x = torch.randn(2, batch, 3)
        compare(program, layer, x.transpose(0, 1) if layer.batch_first else x)


@pytest.mark.parametrize(("kind", "strict"), [("LSTM", False), ("GRU", True), ("RNN", False)])
def test_an_exported_cell_runs_at_other_batch_sizes(kind: str, strict: bool) -> None:
    cell = getattr(layers, f"KRU{kind}Cell")(3, 16, factors="4x4")

    def state(batch: int) -> Any:
        return (torch.randn(batch, 16),) * 2 if kind == "LSTM" else torch.randn(batch, 16)

    batch = {0: Dim("batch", min=1, max=64)}
    shapes = (batch, (batch, batch) if kind == "LSTM" else batch)
    program = export(cell, (torch.randn(4, 3), state(4)), dynamic_shapes=shapes, strict=strict).module()
    for size in (1, 9):
        compare(program, cell, torch.randn(size, 3), state(size))


@pytest.mark.parametrize("complex_state", [True, False])
def test_an_exported_kru_runs_at_other_batch_sizes(complex_state: bool) -> None:
    layer = KRU(3, 8, complex_state=complex_state)
    program = export(layer, (torch.randn(2, 4, 3),), dynamic_shapes=({1: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 9):
        compare(program, layer, torch.randn(2, batch, 3))


def test_the_kernels_keep_time_dynamic_too() -> None:
    layer = KRUGRU(3, 16, factors="4x4", backend="kernel")
    shapes = ({0: Dim("time", min=1, max=64), 1: Dim("batch", min=1, max=64)},)
    program = export(layer, (torch.randn(2, 4, 3),), dynamic_shapes=shapes).module()
    for steps, batch in ((1, 9), (5, 1), (3, 2)):
        compare(program, layer, torch.randn(steps, batch, 3))


def gradients(module: Any, parameters: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    output = module(x)
    output = output[0] if isinstance(output, tuple) else output
    return torch.autograd.grad(output.square().sum(), parameters)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"KRU{kind}", {"backend": backend}) for kind, backend in all_pairs(kind=KINDS, backend=BACKENDS)),
        *((f"KRU{kind}Cell", {}) for kind in KINDS),
        ("KRULSTMCell", {"factors": "stacked:2*(16x4,4x4)+sparse:5%"}),
        ("KRU", {}),
        ("KRU", {"complex_state": False}),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_module_serves_other_batch_sizes_and_learns(name: str, options: Any, grad: bool) -> None:
    module = getattr(layers, name)(3, 16, **{"factors": "4x4", **options})
    shape = (3,) if name.endswith("Cell") else (2, 3)
    x, other = (torch.randn(*shape[:-1], batch, 3) for batch in (2, 5))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (x,))
        compare(traced, module, x)
        compare(traced, module, other)
    parameters = list(module.parameters())
    if grad:
        torch.testing.assert_close(gradients(traced, parameters, other), gradients(module, parameters, other))
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    compare(traced, module, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["KRULSTM", "KRUGRU", "KRURNN", "KRUGRUCell", "KRU"])
def test_script_and_fx_say_what_to_use_instead(name: str) -> None:
    network = nn.Sequential(getattr(layers, name)(3, 16))
    with pytest.raises(KruifyError, match=r"torch\.jit\.script cannot compile it\. Use torch\.jit\.trace"):
        torch.jit.script(network)
    with pytest.raises(KruifyError, match=r"got a Proxy\. Make this class a leaf: is_leaf_module"):
        torch.fx.symbolic_trace(network)


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KRUGRU) or super().is_leaf_module(m, module_qualified_name)


def test_fx_takes_a_layer_as_a_leaf() -> None:
    network = nn.Sequential(nn.Linear(3, 3), KRUGRU(3, 16))
    compare(torch.fx.GraphModule(network, Leaves().trace(network)), network, torch.randn(2, 4, 3))


@pytest.mark.parametrize("name", ["KRULSTM", "KRUGRU", "KRURNN", "KRULSTMCell", "KRUGRUCell", "KRURNNCell", "KRU"])
def test_on_the_meta_device_shapes_alone(name: str) -> None:
    """As torch.nn: shapes in, shapes out; with an input that has numbers an error, never numbers from nowhere."""
    module, plain = (getattr(layers, name)(3, 16, device=device) for device in ("meta", "cpu"))
    x = torch.randn(5, 3) if name.endswith("Cell") else torch.randn(2, 5, 3)
    found, wanted = module(x.to("meta")), plain(x)
    found, wanted = (o if isinstance(o, tuple) else (o,) for o in (found, wanted))
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)
    with pytest.raises(KruifyError, match=r"the weights on meta, the input on cpu\. They have no numbers yet"):
        module(x)
    with pytest.raises(KruifyError, match="the weights on cpu, the input on meta"):
        plain(x.to("meta"))
    module.load_state_dict(plain.state_dict(), assign=True)
    compare(module, plain, x)


@pytest.mark.parametrize("name", ["KRULSTM", "KRUGRU", "KRULSTMCell", "KRUGRUCell"])
def test_a_state_on_another_device_is_refused(name: str) -> None:
    module, cell = getattr(layers, name)(3, 16), name.endswith("Cell")
    x, h = (torch.randn(5, 3), torch.randn(5, 16)) if cell else (torch.randn(2, 5, 3), torch.randn(1, 5, 16))
    state, elsewhere = ((s, s) if "LSTM" in name else s for s in (h, h.to("meta")))
    with torch.no_grad():
        for _ in range(2):
            module(x, state)
        with pytest.raises((KruifyError, RuntimeError), match=r"state on meta, the input on cpu|several devices"):
            module(x, elsewhere)
