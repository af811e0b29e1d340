"""A few small calls of every kernel, for compute-sanitizer: run by tests/cuda/gpu.sh under memcheck and racecheck."""

from __future__ import annotations

import torch

from kruify import ops as ops  # registers the operators
from kruify.ops import has_kernel, precision
from kruify.ops.layout import Layout, TermLayout

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_modrelu_complex": 1}


def run(
    kind: str,
    hidden: int,
    terms: list[tuple[int, list[tuple[int, int]]]],
    sizes: list[int],
    dtype: torch.dtype,
    products: int = precision.FLOAT32,
) -> None:
    """Forward and backward of a recurrence and of a product."""
    gates = GATES[kind]

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, dtype=dtype, device="cuda") / 4).requires_grad_()

    stages = [leaf(gates, rank, *shape) for rank, shapes in terms for shape in shapes]
    layout = Layout(
        gates, hidden, hidden, (0,), tuple(TermLayout(len(shapes), tuple(range(gates))) for _, shapes in terms)
    )
    diagonal, bias = leaf(1, hidden), leaf(gates * hidden)
    threshold = bias if "complex" not in kind else leaf(hidden // 2)
    residual = index = None
    if len(terms) > 1:
        residual = leaf(3, 2)
        index = torch.tensor([[0, 1], [1, 0], [gates * hidden - 2, 3]], dtype=torch.int32, device="cuda")
    matrix = (stages, diagonal, residual, index)
    x, h0 = leaf(sum(sizes), gates * hidden), leaf(sizes[0], hidden)
    c0 = leaf(sizes[0], hidden) if kind == "lstm" else None
    steps = torch.tensor(sizes)
    out, h, _, _ = torch.ops.kruify.recurrence(
        x, None, None, steps, h0, c0, *matrix, threshold, layout.encode(), kind, False, True, products
    )
    (out.sum() + h.sum()).backward()
    torch.ops.kruify.kron_matmul(leaf(9, hidden), *matrix, bias, layout.encode(), products).sum().backward()
    torch.cuda.synchronize()
    print(kind, hidden, dtype, precision.NAMES[products], "ran")  # where a sanitizer runs out of time, how far it came


def main() -> None:
    if not has_kernel("cuda"):
        raise SystemExit("the library was built without CUDA")
    for rows1, rows2 in ((12, 8), (16, 16), (32, 32), (64, 64)):  # the large ones last: a sanitizer takes long for them
        for kind in GATES:
            pair = [(rows1, rows1), (rows2, rows2)]
            for products in (precision.FLOAT32, precision.TF32, precision.BF16):
                run(kind, rows1 * rows2, [(1, pair)], [2, 2, 1], torch.float32, products)
    for kind in GATES:
        run(kind, 256, [(2, [(16, 16), (16, 16)])], [140, 140], torch.float32)
        run(kind, 24, [(2, [(3, 3), (8, 8)]), (1, [(24, 1), (1, 24)])], [3, 2], torch.float32)
        run(kind, 24, [(2, [(3, 3), (8, 8)]), (1, [(24, 1), (1, 24)])], [3, 2], torch.float64)
        for products in (precision.FLOAT32, precision.TF32, precision.BF16):
            run(kind, 512, [(40, [(512, 1), (1, 512)])], [20, 9, 1], torch.float32, products)
        run(kind, 128, [(8, [(128, 1), (1, 128)]), (2, [(32, 32), (4, 4)])], [5, 3], torch.float32)
    factors = [(torch.randn(4, 2, 2, 2, device="cuda")).requires_grad_() for _ in range(4)]
    scale = torch.randn(4, 2, device="cuda", requires_grad=True)
    sum(s.sum() for s in torch.ops.kruify.merge(factors, scale, [1, 3])).backward()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
