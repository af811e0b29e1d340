"""What autocast and torch's TF32 switch mean to operators and layers. The GPU's products are in tests/cuda."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops_cases import differentiable, recurrence_arguments
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kruify.layers import KRUGRU, KRULSTM, KRURNN, kernel
from kruify.layers.base import KRUBase
from kruify.ops import precision

pytestmark = pytest.mark.usefixtures("compiled")
LOWER = (torch.bfloat16, torch.float16)
CUDA = torch.device("cuda")


@pytest.fixture
def settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("settings")
def test_tf32_follows_torch() -> None:
    assert precision.of_products(CUDA) == precision.FLOAT32
    for setting, wanted in (("high", precision.TF32), ("medium", precision.TF32), ("highest", precision.FLOAT32)):
        torch.set_float32_matmul_precision(setting)
        assert precision.of_products(CUDA) == wanted
        assert precision.of_products(torch.device("cpu")) == precision.FLOAT32
    torch.backends.cuda.matmul.allow_tf32 = True
    assert precision.of_products(CUDA) == precision.TF32


def test_autocast_decides_over_torch_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype, wanted in ((torch.bfloat16, precision.BF16), (torch.float16, precision.TF32)):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert precision.of_products(CUDA) == wanted
    assert precision.of_products(torch.device("cpu")) == precision.FLOAT32


@pytest.mark.usefixtures("settings")
def test_the_switch_compiles_and_is_seen_again() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def count(x: Tensor) -> Tensor:
        return x + precision.of_products(CUDA)

    assert count(torch.zeros(1)).item() == precision.FLOAT32
    torch.set_float32_matmul_precision("high")
    assert count(torch.zeros(1)).item() == precision.TF32


@pytest.mark.parametrize("wrong", [-1, 3])
def test_unknown_precisions_are_refused(wrong: int) -> None:
    arguments = recurrence_arguments("gru", "tiny", (2, 1), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="precision"):
        torch.ops.kruify.recurrence(*arguments, wrong)
    with pytest.raises(RuntimeError, match="precision"):
        torch.ops.kruify.kron_matmul_forward(torch.ones(2, 6), *arguments[6:12], wrong)


@pytest.mark.parametrize("asked", [precision.FLOAT32, precision.TF32, precision.BF16])
def test_the_cpu_is_exact_whatever_is_asked_for(asked: int) -> None:
    arguments = recurrence_arguments("lstm", "pair", (3, 1), dtype=torch.float32)
    leaves = differentiable(arguments)
    first, second = torch.ops.kruify.recurrence(*arguments), torch.ops.kruify.recurrence(*arguments, asked)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(r[0].square().sum(), leaves) for r in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def gradients(layer: KRUBase, out: Tensor, again: bool = False) -> list[Tensor]:
    loss = out.float().square().mean()
    return list(torch.autograd.grad(loss, list(layer.parameters()), retain_graph=again))


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("kind", [KRULSTM, KRUGRU, KRURNN])
def test_layers_under_autocast_on_the_cpu(kind: type[KRUBase], lower: torch.dtype) -> None:
    """The float32 kernel runs, on inputs of any floating dtype; results are rounded once, at the end."""
    layer = kind(6, 16, num_layers=2, bidirectional=True, factors="2x2", backend="kernel")
    x = torch.randn(5, 3, 6)
    exact, state = layer(x)
    given = state[0] if isinstance(state, tuple) else state
    for source in (x, x.to(lower)):
        with torch.autocast("cpu", dtype=lower):
            out, final = layer(source)
        for t in (out, *(final if isinstance(final, tuple) else (final,))):
            assert t.dtype == lower
        rounded = exact if source is x else layer(source.float())[0]
        assert torch.equal(out, rounded.to(lower))
        for a, b in zip(gradients(layer, out), gradients(layer, exact, again=True), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 0.03 * b.norm()
    with torch.autocast("cpu", dtype=lower), torch.no_grad():
        assert layer(x, (state if isinstance(state, tuple) else given))[0].dtype == lower
        packed, _ = layer(pack_sequence([x[:, 0], x[:3, 1]]))
    assert packed.data.dtype == lower


@pytest.fixture
def bfloat16_lstm() -> None:
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(8, 16)(torch.randn(5, 3, 8))
    except RuntimeError:
        pytest.skip("torch's own LSTM does not run in bfloat16 on this CPU")


@pytest.mark.usefixtures("bfloat16_lstm")
def test_the_dtype_is_that_of_torch_s_lstm() -> None:
    x, torchs = torch.randn(5, 3, 8), nn.LSTM(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, states = torchs(x)
        for backend in ("kernel", "dense", "reference", "auto"):
            layer: Any = KRULSTM(8, 16, factors="4x4", backend=backend)
            out, (h, c) = layer(x)
            assert (out.dtype, h.dtype, c.dtype) == (wanted.dtype, states[0].dtype, states[1].dtype)


@pytest.mark.usefixtures("bfloat16_lstm")
def test_projections_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = KRULSTM(16, 16, factors="auto", proj_size=4)
        out, _ = layer(torch.randn(5, 3, 16))
    assert out.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in gradients(layer, out))


def test_kronecker_input_weights_under_autocast() -> None:
    """Both products in float32, rounded once."""
    x, layer = torch.randn(5, 3, 16), KRULSTM(16, 16, factors="auto", input_factors="4x4", backend="kernel")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x)
    assert torch.equal(out, layer(x)[0].bfloat16())
    assert all(g.isfinite().all() for g in gradients(layer, out))


def test_float64_stays_under_autocast() -> None:
    layer = KRULSTM(6, 16, factors="4x4", dtype=torch.float64, backend="kernel")
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x)[0], layer(x)[0].double())


def test_without_autocast_other_dtypes_are_not_served() -> None:
    matrix = KRULSTM(6, 16, factors="4x4").weight_hh_l0
    assert kernel.serves(matrix, torch.empty(0), False)
    for dtype in (*LOWER, torch.float64):
        assert not kernel.serves(matrix, torch.empty(0, dtype=dtype), False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel.serves(matrix, torch.empty(0, dtype=torch.bfloat16), False)
        assert not kernel.serves(matrix, torch.empty(0, dtype=torch.float64), False)


def test_compiled_under_autocast() -> None:
    layer = KRUGRU(6, 16, factors="4x4", backend="kernel")
    x = torch.randn(4, 2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = layer(x)[0], compiled(x)[0]
    assert torch.equal(wanted, found)
    for a, b in zip(gradients(layer, wanted), gradients(layer, found), strict=True):
        torch.testing.assert_close(a, b)
