"""The kernels on a GPU (`make test-gpu`): parity with the float64 reference, derivatives, graphs, streams, compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn

import kruify
from kruify import layers
from kruify import ops as ops  # registers the operators
from kruify.errors import KruifyError
from kruify.ops import backend_info, has_kernel, precision, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif(
        not has_kernel("cuda"),
        reason="the library was built without CUDA: KRUIFY_CUDA=1 python setup.py build_ext --inplace",
    ),
]

GATES = reference.GATES
KINDS = tuple(GATES)
FIXED_SHAPES = ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # of the largest value
LOWER = {
    precision.TF32: 2e-3,
    precision.BF16: 1.6e-2,
}  # the same on tensor cores, as tests/cuda/test_tensor_cores.py has it


def pair(kind: str, rows1: int, rows2: int, rank: int):  # type: ignore[no-untyped-def]
    gates = GATES[kind]
    return gates, rows1 * rows2, rows1 * rows2, [(range(gates), rank, [(rows1, rows1), (rows2, rows2)])]


def everything(kind: str):  # type: ignore[no-untyped-def]
    gates = GATES[kind]
    terms = [
        (range(gates), 2, [(3, 3), (2, 2), (4, 4)]),
        ([gates - 1], 1, [(24, 24)]),
        (range(gates), 3, [(24, 1), (1, 24)]),
    ]
    return gates, 24, 24, terms


def close(name: str, got: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    """Within 1e-5 (float32) of the largest value."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got - wanted).abs().max()) / scale if wanted.numel() else 0.0
    assert error <= factor, f"{name}: off by {error:.2e} of the largest value, {factor:.0e} allowed"


def inputs(m, kind, sizes, dtype=torch.float64, columns=0):  # type: ignore[no-untyped-def]
    """x, w_ih, bias_ih, batch_sizes, h0, c0 on the CPU."""
    batch_sizes = torch.tensor(sizes, dtype=torch.int64)
    hidden, total, batch = m.layout.rows, sum(sizes), sizes[0]
    width = GATES[kind] * hidden
    x = torch.randn(total, columns or width, dtype=dtype)
    w = torch.randn(width, columns, dtype=dtype) / columns**0.5 if columns else None
    b = torch.randn(width, dtype=dtype) / 4 if columns else None
    h0 = torch.randn(batch, hidden, dtype=dtype) / 2
    c0 = torch.randn(batch, hidden, dtype=dtype) / 2 if kind == "lstm" else None
    return x, w, b, batch_sizes, h0, c0


def run(m, kind, given, reverse, device, dtype, products=precision.FLOAT32):  # type: ignore[no-untyped-def]
    """Outputs and gradients of everything, by the operator (cuda) or the reference (cpu)."""
    m = m.of_kind(kind)

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device, dtype).requires_grad_()

    x, w, b, sizes, h0, c0 = given
    leaves = [leaf(t) for t in (x, w, b, h0, c0, *m.stages, m.diagonal, m.residual, m.bias)]
    x1, w1, b1, h1, c1, *stages, diagonal, residual, bias = leaves
    index = None if m.index is None else m.index.to(device)
    matrix = (stages, diagonal, residual, index, bias, m.layout.encode())
    if device == "cpu":
        out, h, c, _ = reference.recurrence(x1, w1, b1, sizes, h1, c1, *matrix, kind, reverse)
    else:
        out, h, c, _ = torch.ops.kruify.recurrence(x1, w1, b1, sizes, h1, c1, *matrix, kind, reverse, True, products)
    results = [out, h, *([c] if kind == "lstm" else [])]
    torch.manual_seed(7)
    weights = [torch.randn(r.shape, dtype=torch.float64).to(device, dtype) for r in results]
    grads = torch.autograd.grad(results, [t for t in leaves if t is not None], weights)
    return [*results, *grads]


def parity(m, kind, sizes, reverse, dtype, columns=0, products=precision.FLOAT32):  # type: ignore[no-untyped-def]
    given = inputs(m, kind, sizes, columns=columns)
    found = run(m, kind, given, reverse, "cuda", dtype, products)
    expected = run(m, kind, given, reverse, "cpu", torch.float64)
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        close(f"result {k}", got, wanted, LOWER.get(products, TOLERANCE[dtype]))


@pytest.mark.parametrize(("kind", "shape", "batch"), all_pairs(kind=KINDS, shape=FIXED_SHAPES, batch=(1, 5)))
def test_fixed_shapes(matrix, kind, shape, batch) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, *shape, 1)), kind, [batch] * 7, batch == 1, torch.float32)


@pytest.mark.parametrize("kind", KINDS[:3])  # rounding may take a ReLU over its kink; its template is that of tanh
@pytest.mark.parametrize("shape", FIXED_SHAPES, ids=str)
@pytest.mark.parametrize("products", LOWER)
def test_fixed_shapes_on_tensor_cores(matrix, kind, shape, products) -> None:  # type: ignore[no-untyped-def]
    for batch in (1, 40, 150):
        parity(matrix(*pair(kind, *shape, 1)), kind, [batch] * 4, batch == 40, torch.float32, products=products)


@pytest.mark.parametrize("products", LOWER)
def test_tensor_cores_with_other_shapes(matrix, products) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", 48, 16, 2), diagonal=(0,))
    parity(m, "lstm", [3, 3, 2, 1], True, torch.float32, columns=10, products=products)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge(dtype) -> None:  # type: ignore[no-untyped-def]
    factors = [torch.randn(4, 2, *s, dtype=torch.float64) for s in ((2, 2), (2, 3), (4, 2), (2, 2))]
    scale = torch.randn(4, 2, dtype=torch.float64)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        own, weight = [f.to(device, kind) for f in factors], scale.to(device, kind)
        stages = torch.ops.kruify.merge(own, weight, [1, 3])
        grads = torch.ops.kruify.merge_backward([2 * s for s in stages], own, weight, [1, 3])
        results.append([*stages, *grads])
    for got, wanted in zip(*results, strict=True):
        close("result", got, wanted, TOLERANCE[dtype])


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
    parity(matrix(*pair(kind, 32, 32, 1)), kind, [batch, batch, batch - batch // 2], False, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks(matrix, kind, rank) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, 16, 32, rank), diagonal=(0,)), kind, [3, 3, 2, 1], True, torch.float32, columns=10)


@pytest.mark.parametrize(
    ("kind", "reverse", "dtype"),
    all_pairs(kind=KINDS, reverse=(False, True), dtype=(torch.float32, torch.float64)),
)
def test_general(matrix, kind, reverse, dtype) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*everything(kind), diagonal=[GATES[kind] - 1], residual=30)
    parity(m, kind, [4, 3, 3, 1], reverse, dtype, columns=6)


@pytest.mark.parametrize("kind", KINDS)
def test_structures_too_large_for_shared_memory(matrix, kind) -> None:  # type: ignore[no-untyped-def]
    parity(matrix(*pair(kind, 64, 64, 4)), kind, [2, 2, 1], False, torch.float32)
    parity(matrix(*pair(kind, 64, 32, 1)), kind, [2, 1], False, torch.float64)
    terms = [(range(GATES[kind]), 1, [(2, 2), (3, 3)])] * 17
    parity(matrix(GATES[kind], 6, 6, terms), kind, [2, 2], False, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(matrix, kind) -> None:  # type: ignore[no-untyped-def]
    """Packed sequences of a thousand steps: starts are uploaded in several launches."""
    sizes = [3] * 500 + [2] * 400 + [1] * 300
    given = inputs(matrix(*pair(kind, 16, 16, 1)), kind, sizes)
    m = matrix(*pair(kind, 16, 16, 1))
    for got, wanted in zip(
        run(m, kind, given, True, "cuda", torch.float32), run(m, kind, given, True, "cpu", torch.float64), strict=True
    ):
        close("result", got, wanted, 1e-4)  # a thousand steps feed rounding back into themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [[(4, 8), (12, 8)], [(32, 32), (32, 32)], [(2, 3), (3, 2), (4, 2)]], ids=str)
def test_product(matrix, shapes, dtype) -> None:  # type: ignore[no-untyped-def]
    rows, cols = (int(torch.tensor([s[k] for s in shapes]).prod()) for k in (0, 1))
    m = matrix(3, rows, cols, [((0, 2), 2, shapes), ((0, 1, 2), 1, shapes)], diagonal=(1,), residual=9)
    x = torch.randn(2, 37, cols, dtype=torch.float64)
    grad = torch.randn(2, 37, 3 * rows, dtype=torch.float64)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        leaves = [t.to(device, kind).requires_grad_() for t in (x, *m.stages, m.diagonal, m.residual, m.bias)]
        x1, *stages, diagonal, residual, bias = leaves
        function = torch.ops.kruify.kron_matmul if device == "cuda" else reference.kron_matmul
        y = function(x1, stages, diagonal, residual, m.index.to(device), bias, m.layout.encode())
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(device, kind))])
    for got, wanted in zip(*results, strict=True):
        close("result", got, wanted, TOLERANCE[dtype])


def on_gpu(m, dtype):  # type: ignore[no-untyped-def]
    stages, diagonal, residual, index, bias, layout = m.to(dtype).arguments()
    put = lambda t: None if t is None else t.cuda()  # noqa: E731
    return [put(s) for s in stages], put(diagonal), put(residual), put(index), put(bias), layout


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(matrix, kind) -> None:  # type: ignore[no-untyped-def]
    gates = GATES[kind]
    m = matrix(gates, 6, 6, [(range(gates), 2, [(2, 3), (3, 2)])], diagonal=(0,), residual=3, block=2).of_kind(kind)
    x, w, b, sizes, h0, c0 = inputs(m, kind, [3, 2], columns=4)
    stages, diagonal, residual, index, bias, layout = on_gpu(m, torch.float64)
    tensors = [x, w, b, h0, c0, *stages, diagonal, residual, bias]
    leaves = [t.cuda().requires_grad_() for t in tensors if t is not None]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        x, w, b, h0, c0, *stages, diagonal, residual, bias = (None if t is None else next(rest) for t in tensors)
        found = torch.ops.kruify.recurrence(
            x, w, b, sizes, h0, c0, stages, diagonal, residual, index, bias, layout, kind, True, True
        )
        return found[: 3 if kind == "lstm" else 2]

    assert torch.autograd.gradcheck(function, leaves)


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


@pytest.mark.parametrize("sizes", [[4] * 6, [4, 4, 3, 1]], ids=["equal", "packed"])
@pytest.mark.parametrize("general", [False, True])
def test_cuda_graphs(matrix, sizes, general) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward are captured and replayed on new inputs; packed sizes live in the graph."""
    m = matrix(*everything("lstm"), residual=30) if general else matrix(*pair("lstm", 16, 16, 1))
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


def test_wrong_arguments_are_refused(matrix) -> None:  # type: ignore[no-untyped-def]
    m = matrix(*pair("lstm", 16, 16, 1))
    stages, diagonal, residual, index, bias, layout = on_gpu(m, torch.float32)
    x, _, _, sizes, h0, c0 = inputs(m, "lstm", [2, 1], torch.float32)
    good = [
        x.cuda(),
        None,
        None,
        sizes,
        h0.cuda(),
        c0.cuda(),
        stages,
        diagonal,
        residual,
        index,
        bias,
        layout,
        "lstm",
        False,
        False,
    ]
    torch.ops.kruify.recurrence_forward(*good)
    wrong = {
        0: [x.cuda().double(), x.cuda()[:, :-1], x.cuda()[:-1]],
        3: [torch.tensor([1, 2]), torch.tensor([2, 2]), torch.tensor([2, 0, 1]), sizes.int()],
        4: [h0, h0.cuda()[:1]],
        5: [None, c0.cuda()[:, :-1]],
        6: [stages[:1], [*stages, stages[0]], [stages[0][:, :, :-1], stages[1]]],
        11: [layout[:-1], [3, *layout[1:]]],
        12: ["gru", "transformer"],
    }
    for place, values in wrong.items():
        for value in values:
            with pytest.raises((RuntimeError, KruifyError)):
                torch.ops.kruify.recurrence_forward(*[value if k == place else g for k, g in enumerate(good)])
    torch.cuda.synchronize()


def test_backend_info_tells_of_cuda() -> None:
    assert backend_info()["cuda"] is True
