"""What only a GPU shows (`make test-gpu`), beside test_parity.py: large batches, graphs, streams, layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import KINDS, LOWER, close, everything, inputs, low_rank, pair, parity, run, sums
from torch import Tensor, nn

import kruify
from kruify import layers
from kruify import ops as ops  # registers the operators
from kruify.ops import backend_info, graphs, has_kernel, precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif(
        not has_kernel("cuda"),
        reason="the library was built without CUDA: KRUIFY_CUDA=1 python setup.py build_ext --inplace",
    ),
]


@pytest.mark.parametrize("products", LOWER)
def test_tensor_cores_are_used_and_give_the_same_bits_twice(matrix, products) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("gru", 32, 32, 1))
    given = inputs(m, "gru", [64] * 5 + [3])
    first, second = (run(m, "gru", given, False, "cuda", torch.float32, products) for _ in range(2))
    exact = run(m, "gru", given, False, "cuda", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], exact[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_layers_follow_torch_s_switches(kind) -> None:  # type: ignore[no-untyped-def]
    layer = getattr(layers, f"KRU{kind}")(48, 256, num_layers=2, factors="16x16,16x16", backend="kernel").cuda()
    x = torch.randn(20, 6, 48, device="cuda")

    def both() -> tuple[Tensor, list[Tensor]]:
        out = layer(x)[0]
        return out, list(torch.autograd.grad(out.float().square().mean(), list(layer.parameters())))

    exact, grads = both()
    try:
        torch.set_float32_matmul_precision("high")
        results = [(both(), torch.float32, 5e-3)]
    finally:
        torch.set_float32_matmul_precision("highest")
    for dtype, allowed in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        with torch.autocast("cuda", dtype=dtype):
            results.append((both(), dtype, allowed))
    for (out, found), dtype, allowed in results:
        assert out.dtype == dtype and not torch.equal(out.float(), exact)
        close("output", out, exact, allowed)
        for got, wanted in zip(found, grads, strict=True):
            assert got.dtype == torch.float32
            close("gradient", got / wanted.abs().max(), wanted / wanted.abs().max(), 10 * allowed)


@pytest.mark.parametrize("spec", ["stacked:3*auto", "stacked:2*auto:3+sparse:5%:1"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_stacked_gates(kind, spec) -> None:  # type: ignore[no-untyped-def]
    layer = getattr(layers, f"KRU{kind}")(12, 64, factors=spec, dtype=torch.float64, backend="kernel")
    x = torch.randn(9, 5, 12, dtype=torch.float64)
    expected = layer(x)[0]
    wanted = torch.autograd.grad(expected.square().mean(), list(layer.parameters()))
    layer = layer.cuda()
    out = layer(x.cuda())[0]
    found = torch.autograd.grad(out.square().mean(), list(layer.parameters()))
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(got.cpu(), want)


def test_a_sparse_residual_that_leads_out_of_the_matrix_is_told() -> None:
    """In a process of its own: what stops a kernel ends the context."""
    code = """if True:
        import torch
        from kruify.ops import Layout
        index = torch.tensor([[2, 0]], dtype=torch.int32, device="cuda")
        values, x = torch.ones(1, 4, device="cuda"), torch.ones(2, 4, device="cuda")
        y = torch.ops.kruify.kron_matmul_forward(x, [], None, values, index, None, Layout(1, 4, 4, (), ()).encode())
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print("told")
    """
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "told" in done.stdout and "outside its gate" in done.stderr, done.stderr[-2000:]


def test_the_rule_asks_for_shared_memory() -> None:
    fits = torch.ops.kruify.template_fits
    assert fits(4, 1, 16, 16, True, precision.FLOAT32, 0)
    assert not fits(4, 64, 64, 64, False, precision.BF16, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 16, 40, 64, 150, 300])
def test_every_cluster_size(matrix, kind, batch) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, 32, 32, 1)), kind, [batch, batch, batch - batch // 2], False, torch.float32, "cuda")


@pytest.mark.parametrize(("hidden", "rank"), [(256, 16), (1024, 64), (2048, 128)])
@pytest.mark.parametrize("batch", [1, 5, 64, 150])
def test_low_rank_in_every_cluster_size(matrix, hidden, rank, batch) -> None:  # type: ignore[no-untyped-def]
    """The last size fits nowhere and goes step by step."""
    m = matrix(*low_rank("lstm", hidden, rank), diagonal=(0,), shared=(0,))
    parity(m, "lstm", [batch, batch, batch - batch // 2], False, torch.float32, "cuda")


@pytest.mark.parametrize(("rows1", "rows2", "rank"), [(16, 16, 8), (32, 32, 20)])
@pytest.mark.parametrize("batch", [1, 64])
def test_sums_with_low_rank(matrix, rows1, rows2, rank, batch) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*sums("lstm", rows1, rows2, rank), diagonal=(0,), shared=(0,), residual=400, block=8)
    parity(m, "lstm", [batch, batch, batch - batch // 2], False, torch.float32, "cuda")


@pytest.mark.parametrize("products", LOWER)
@pytest.mark.parametrize("batch", [40, 150])
def test_large_batches_on_tensor_cores(matrix, batch, products) -> None:  # type: ignore[no-untyped-def]
    for shape in ((16, 16), (64, 64)):
        m = matrix(*pair("lstm", *shape, 1))
        parity(m, "lstm", [batch] * 3, batch == 40, torch.float32, "cuda", products=products)
    m = matrix(*low_rank("lstm", 256, 16), shared=(0,))  # float32 up to about a thousand rows
    parity(m, "lstm", [16 * batch] * 3, False, torch.float32, "cuda", products=products)


def on_gpu(m, dtype):  # type: ignore[no-untyped-def]
    stages, diagonal, residual, index, bias, layout = m.to(dtype).arguments()
    put = lambda t: None if t is None else t.cuda()  # noqa: E731
    return [put(s) for s in stages], put(diagonal), put(residual), put(index), put(bias), layout


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_opcheck(matrix, kind) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair(kind, 16, 16, 1))
    x, w, b, sizes, h0, c0 = inputs(m, kind, [2, 1], torch.float32, columns=5)
    put = lambda t: None if t is None else t.cuda().requires_grad_()  # noqa: E731
    stages, diagonal, residual, index, bias, layout = on_gpu(m, torch.float32)
    call = (
        put(x),
        put(w),
        put(b),
        sizes,
        put(h0),
        put(c0),
        [s.requires_grad_() for s in stages],
        diagonal,
        residual,
        index,
        bias,
    )
    torch.library.opcheck(torch.ops.kruify.recurrence.default, (*call, layout, kind, False, True))
    plain = tuple([s.detach() for s in t] if isinstance(t, list) else t if t is None else t.detach() for t in call)
    torch.library.opcheck(torch.ops.kruify.recurrence_forward.default, (*plain, layout, kind, False, False))
    y = torch.randn(3, 256, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.kruify.kron_matmul.default, (y, stages, diagonal, residual, index, bias, layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("general", [False, True])
def test_the_same_bits_twice(matrix, kind, general) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*everything(kind), residual=30) if general else matrix(*pair(kind, 32, 32, 1))
    given = inputs(m, kind, [64] * 5 + [3])
    first = run(m, kind, given, False, "cuda", torch.float32)
    second = run(m, kind, given, False, "cuda", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_stream(matrix) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", 32, 32, 1))
    given = inputs(m, "lstm", [8] * 20, torch.float64)
    wanted = run(m, "lstm", given, False, "cuda", torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(m, "lstm", given, False, "cuda", torch.float32)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


GRAPHS = {
    "template": (pair("lstm", 16, 16, 1), 0),
    "general": (everything("lstm"), 30),
    "sums": (sums("lstm", 16, 16, 8), 30),
    "step by step": (low_rank("lstm", 2048, 128), 0),
}


@pytest.mark.parametrize("sizes", [[4] * 6, [4, 4, 3, 1]], ids=["equal", "packed"])
@pytest.mark.parametrize("name", GRAPHS)
def test_cuda_graphs(matrix, sizes, name) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward are captured and replayed on new inputs; packed sizes live in the graph."""
    arguments, residual = GRAPHS[name]
    m = matrix(*arguments, residual=residual)
    stages, diagonal, residual, index, bias, layout = on_gpu(m, torch.float32)
    x, _, _, batch_sizes, h0, c0 = inputs(m, "lstm", sizes, torch.float32)
    x, h0, c0, leaves = x.cuda().requires_grad_(), h0.cuda(), c0.cuda(), [s.requires_grad_() for s in stages]

    def step() -> list[Tensor]:
        out, h, c, _ = torch.ops.kruify.recurrence(
            x, None, None, batch_sizes, h0, c0, stages, diagonal, residual, index, bias, layout, "lstm", False, True
        )
        return [out, h, c, *torch.autograd.grad((out.square().sum() + h.sum() + c.sum()), [x, *leaves])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    batch_sizes = batch_sizes.clone()
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("reverse", [False, True])
def test_graphs_keep_steps(kind, reverse) -> None:  # type: ignore[no-untyped-def]
    """Without derivatives: the second call of the same sizes records, the third replays; weights and inputs may change;
    a capture of the caller's gets the launches themselves."""
    rows = {"LSTM": 8192, "GRU": 6144}[kind]
    layer = getattr(layers, f"KRU{kind}")(
        16, 2048, bidirectional=reverse, factors=f"stacked:128*({rows}x1,1x2048)", backend="kernel", device="cuda"
    )
    graphs._known.clear()
    x = torch.randn(70, 3, 16, device="cuda")
    for _ in range(3):
        wanted = layer(x)[0].detach()  # with derivatives: no graph
        with torch.no_grad():
            close("output", layer(x)[0], wanted, 1e-5)
            next(iter(layer.parameters())).mul_(0.9)
            x.normal_()
    assert {type(found) for found in graphs._known.values()} == {graphs.Steps}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        wanted = layer(x)[0]
        with torch.cuda.graph(graph):
            captured = layer(x)[0]
        graph.replay()
    close("captured", captured, wanted, 1e-5)


def test_torch_compile(matrix) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("gru", 16, 16, 1))
    stages, diagonal, residual, index, bias, layout = on_gpu(m, torch.float32)
    x, _, _, sizes, h0, _ = inputs(m, "gru", [2, 2], torch.float32)
    x, h0 = x.cuda().requires_grad_(), h0.cuda()

    def function(x: Tensor) -> Tensor:
        out, _, _, _ = torch.ops.kruify.recurrence(
            x * 2, None, None, sizes, h0, None, stages, diagonal, residual, index, bias, layout, "gru", False, True
        )
        return out.sin().sum()

    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(x), x)[0]
    close("compiled", found, torch.autograd.grad(function(x), x)[0], 1e-5)


@pytest.mark.parametrize("hidden", [128, 512, 6])
@pytest.mark.parametrize("complex_state", [True, False])
def test_a_kru_is_its_reference(complex_state, hidden) -> None:  # type: ignore[no-untyped-def]
    """128 and 512 run in the two-stage templates, 6 in the general kernel."""
    torch.manual_seed(0)
    layer = layers.KRU(5, hidden, 2, factors="auto:2" if hidden == 6 else "2x2", complex_state=complex_state).cuda()
    x = torch.randn(30, 7, 5, device="cuda")
    results = []
    for backend in ("kernel", "reference"):
        layer.backend = backend
        out, h = layer(x)
        grads = torch.autograd.grad(out.square().mean() + h.abs().square().mean(), list(layer.parameters()))
        results.append([out, h, *grads])
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
        close(f"result {k}", a, b, 1e-4)  # both sides are float32


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer_is_the_dense_layer(kind) -> None:  # type: ignore[no-untyped-def]
    """KRU layers on the GPU against torch's own holding the same matrices, in float32 without TF32."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        layer = getattr(layers, f"KRU{kind}")(48, 256, num_layers=2, bidirectional=True, factors="16x16,16x16").cuda()
        model = nn.Sequential(layer)
        dense = kruify.densify(model)[0]
        x = torch.randn(20, 6, 48, device="cuda", requires_grad=True)
        out = layer(x)[0]
        wanted = dense(x)[0]
        close("output", out, wanted, 2e-5)
        a, b = torch.autograd.grad(out.square().mean(), x)[0], torch.autograd.grad(wanted.square().mean(), x)[0]
        close("gradient", a / b.abs().max(), b / b.abs().max(), 1e-4)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("processes", [0, torch.cuda.device_count()])
def test_finetuning(precision, processes) -> None:  # type: ignore[no-untyped-def]
    """In one process, and under torchrun with one process a GPU, in float32 and in mixed precision."""
    pytest.importorskip("accelerate")
    script, device = Path(__file__).with_name("finetune_task.py"), "cuda"
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    done = subprocess.run(
        [sys.executable, *run, str(script), device, precision],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    accuracy = json.loads(done.stdout.strip().splitlines()[-1])
    assert accuracy[-1] > 0.9 > accuracy[0]


def test_backend_info_tells_of_cuda() -> None:
    assert backend_info()["cuda"] is True
