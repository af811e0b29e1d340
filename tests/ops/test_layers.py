"""The layers on the compiled path against the same layers on the dense one, and what only the compiled path does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.errors import UsageError
from kruify.layers import KRUGRU, KRULSTM, KRURNN, KRUGRUCell, KRULSTMCell, KRURNNCell, dispatch
from kruify.layers.base import Backend, KRUBase

pytestmark = pytest.mark.usefixtures("compiled")
LAYERS = [(KRULSTM, {}), (KRUGRU, {}), (KRURNN, {}), (KRURNN, {"nonlinearity": "relu"})]
SPECS = ["2x2", "2*(4x2,4x8)+16x1,1x16+diag+sparse:5%", "stacked:2*auto+sparse:5%"]


def same(layer: KRUBase, x: object) -> None:
    results = []
    for backend in ("kernel", "dense"):
        layer.backend = backend  # type: ignore[assignment]
        out, state = layer(x)  # type: ignore[arg-type]
        tensors = [getattr(out, "data", out), *(state if isinstance(state, tuple) else [state])]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in tensors)
        results.append([*tensors, *torch.autograd.grad(loss, list(layer.parameters()))])  # type: ignore[arg-type]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_equals_the_dense_path(kind: type[KRUBase], options: dict[str, str], spec: str) -> None:
    layer = kind(3, 16, bidirectional=True, factors=spec, dtype=torch.float64, **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    same(layer, x)
    same(layer, pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False))
    deep = kind(
        3,
        16,
        2,
        bias=False,
        factors=spec,
        input_factors="auto" if spec == "2x2" else None,
        dtype=torch.float64,
        **options,
    )
    same(deep, x)


@pytest.mark.parametrize(
    ("backend", "spec"), [("kernel", "2x2"), ("auto", "2x2"), ("auto", "stacked:2*auto+sparse:5%"), ("dense", "2x2")]
)
def test_compiles_as_one_graph(backend: Backend, spec: str) -> None:
    """torch's own LSTM is left out of the graph in training, as in an nn.LSTM."""
    layer = KRULSTM(4, 16, factors=spec, backend=backend)
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(layer, fullgraph=backend != "dense", backend="aot_eager")
    want, actual = layer(x)[0], compiled(x)[0]
    torch.testing.assert_close(actual, want)
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), list(layer.parameters())),
        torch.autograd.grad(want.square().sum(), list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", ["2x2", "auto"])
@pytest.mark.parametrize("kind", [KRULSTMCell, KRUGRUCell, KRURNNCell])
def test_streaming_follows_the_parameters(kind: type[torch.nn.Module], spec: str) -> None:
    cell = kind(3, 16, factors=spec)
    x = torch.randn(2, 3)

    def states(cell: torch.nn.Module) -> list[torch.Tensor]:
        state = cell(x)
        for _ in range(3):
            state = cell(x, state)
        return list(state) if isinstance(state, tuple) else [state]

    want = states(cell)  # with derivatives: no kept arguments
    with torch.no_grad():
        torch.testing.assert_close(states(cell), want)
        twin = copy.deepcopy(cell)
        for parameter in cell.parameters():
            parameter.mul_(0.5)
        changed = states(cell)
        torch.testing.assert_close(states(twin), want)
    torch.testing.assert_close(changed, states(cell))
    assert not torch.allclose(changed[0], want[0])


def test_chained_factors_follow_their_parameters() -> None:
    layer = KRULSTM(3, 16, factors="2x2", backend="kernel")
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        before = layer(x)[0]
        layer.weight_hh_l0.term_list()[0].factors[0].mul_(2)  # type: ignore[union-attr,operator]
        after = layer(x)[0]
        layer.backend = "dense"
        torch.testing.assert_close(after, layer(x)[0])
    assert not torch.allclose(before, after)


def test_rule_prefers_the_kernel_where_it_saves_work_and_dense_where_not() -> None:
    x = torch.zeros(1, 1, 8)
    big = KRULSTM(8, 512)
    assert dispatch.pick(big, 100, 1, x) == dispatch.pick(big, 100, 64, x) == "kernel"
    prime = KRULSTM(8, 521)  # one factor, which is the dense matrix
    assert dispatch.pick(prime, 100, 64, x) == "dense"
    many, small = KRULSTM(8, 512, factors="16*auto"), KRULSTM(8, 64, factors="16*auto")
    assert [dispatch.pick(layer, 100, 64, x) for layer in (many, small)] == ["dense", "kernel"]
    assert dispatch.pick(KRULSTM(8, 16, proj_size=4), 100, 1, x) == "dense"


@pytest.mark.usefixtures("compiled")
def test_rule_sees_an_overlay_that_changed_its_size() -> None:
    annealed, pruned = (KRULSTM(8, 512, factors=f"sparse:{share}%:1") for share in (50, 2))
    x = torch.zeros(3, 16, 8)
    assert [dispatch.pick(layer, 3, 16, x) for layer in (annealed, pruned)] == ["dense", "kernel"]
    overlay, small = (layer.weight_hh_l0.overlay for layer in (annealed, pruned))
    overlay.values, overlay.index = torch.nn.Parameter(small.values.detach()), small.index
    assert dispatch.pick(annealed, 3, 16, x) == "kernel"


def test_forced_kernel_refuses_what_it_cannot_run() -> None:
    layer = KRULSTM(3, 8, proj_size=4, factors="auto", backend="kernel")
    with pytest.raises(UsageError, match="backend='auto'"):
        layer(torch.zeros(2, 1, 3))


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_do_not_see_columns_that_a_sparse_residual_does_not_hold(
    backend: Backend, dtype: torch.dtype, batch: int
) -> None:
    layer = KRURNN(2, 24, factors="sparse:20%:1", dtype=dtype, backend=backend)
    assert layer.weight_hh_l0.overlay is not None
    torch.nn.init.normal_(layer.weight_hh_l0.overlay.values, std=0.3)
    dense, h = layer.weight_hh_l0.to_dense().detach(), torch.randn(1, batch, 24, dtype=dtype)
    h[..., 0] = torch.inf
    x, wanted = torch.randn(40, batch, 2, dtype=dtype), h[0]
    outputs = layer(x, h)[0]
    for step, output in zip(x, outputs, strict=True):
        products = torch.where(dense != 0, dense * wanted[:, None], 0).sum(2)  # (batch, rows)
        wanted = torch.tanh(step @ layer.weight_ih_l0.mT + layer.bias_ih_l0 + layer.bias_hh_l0 + products)
        torch.testing.assert_close(output, wanted)
        assert output.isfinite().all()
