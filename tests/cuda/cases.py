"""Recurrences on a GPU, or on the shim that plays one, against the float64 reference: what the tests here share."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from kruify import ops as ops  # registers the operators
from kruify.ops import precision, reference

GATES = reference.GATES
KINDS = tuple(GATES)
FIXED_SHAPES = ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
PACKED = [3, 2, 2, 1]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # of the largest value
LOWER = {precision.TF32: 2e-3, precision.BF16: 1.6e-2}  # the same on tensor cores: some roundings of half a unit each


def pair(kind: str, rows1: int, rows2: int, rank: int = 1) -> tuple[Any, ...]:
    """Arguments of the fixture `matrix`: one term of two square stages for all gates."""
    gates = GATES[kind]
    return gates, rows1 * rows2, rows1 * rows2, [(range(gates), rank, [(rows1, rows1), (rows2, rows2)])]


def low_rank(kind: str, hidden: int, rank: int, rest: int = 0) -> tuple[Any, ...]:
    """Arguments of `matrix`: outer products for all gates, and `rest` more for the last one."""
    gates = GATES[kind]
    terms = [(range(gates), rank, [(hidden, 1), (1, hidden)])]
    return gates, hidden, hidden, terms + [([gates - 1], rest, [(hidden, 1), (1, hidden)])] * bool(rest)


def sums(kind: str, rows1: int, rows2: int, rank: int) -> tuple[Any, ...]:
    """Arguments of `matrix`: outer products and one term of two square stages, of rank 2, for all gates."""
    gates, hidden, _, terms = low_rank(kind, rows1 * rows2, rank)
    return gates, hidden, hidden, [*terms, (range(gates), 2, [(rows1, rows1), (rows2, rows2)])]


def everything(kind: str) -> tuple[Any, ...]:
    """Arguments of `matrix` that only the general kernel takes."""
    gates = GATES[kind]
    terms = [
        (range(gates), 2, [(3, 3), (2, 2), (4, 4)]),
        ([gates - 1], 1, [(24, 24)]),
        (range(gates), 3, [(24, 1), (1, 24)]),
    ]
    return gates, 24, 24, terms


def guarded(t: Tensor) -> Tensor:
    """A copy on the CPU that ends, up to 12 bytes before, at a page that nobody may touch."""
    size = max(16, -(-t.numel() * t.element_size() // 16) * 16)
    page = mmap.PAGESIZE
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages - 1) * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=t.dtype, count=max(1, t.numel()), offset=(pages - 1) * page - size)
    return whole[: t.numel()].view(t.shape).copy_(t.detach())


def close(name: str, got: Tensor, wanted: Tensor, allowed: float) -> None:
    """Within `allowed` of the largest value; NaN is close to nothing."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)} for {tuple(wanted.shape)}"
    if wanted.numel():
        error = float((got - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        assert error <= allowed, f"{name}: off by {error:.2e} of the largest value, {allowed:.0e} allowed"


def inputs(m: Any, kind: str, sizes: list[int], dtype: torch.dtype = torch.float64, columns: int = 0) -> Any:
    """x, w_ih, bias_ih, batch_sizes, h0, c0 on the CPU; without `columns` x is the input's share of the gates."""
    hidden, width = m.layout.rows, GATES[kind] * m.layout.rows
    x = torch.randn(sum(sizes), columns or width, dtype=dtype)
    w = torch.randn(width, columns, dtype=dtype) / columns**0.5 if columns else None
    b = torch.randn(width, dtype=dtype) / 4 if columns else None
    h0 = torch.randn(sizes[0], hidden, dtype=dtype) / 2
    c0 = torch.randn(sizes[0], hidden, dtype=dtype) / 2 if kind == "lstm" else None
    return x, w, b, torch.tensor(sizes), h0, c0


def run(
    m: Any, kind: str, given: Any, reverse: bool, device: str, dtype: torch.dtype,
    products: int = precision.FLOAT32, without: tuple[int, ...] = (),
) -> list[Tensor]:  # fmt: skip
    """Outputs, and gradients of everything from all outputs but those `without`; on "reference" by ops/reference.py."""
    m, where = m.of_kind(kind), "cpu" if device == "reference" else device

    def leaf(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return (guarded(t.to(dtype)) if device == "cpu" else t.to(where, dtype)).requires_grad_()

    x, w, b, sizes, h0, c0 = given
    leaves = [leaf(t) for t in (x, w, b, h0, c0, *m.stages, m.diagonal, m.residual, m.bias)]
    x1, w1, b1, h1, c1, *stages, diagonal, residual, bias = leaves
    index = None if m.index is None else m.index.to(where)
    call: Any = (x1, w1, b1, sizes, h1, c1, stages, diagonal, residual, index, bias, m.layout.encode(), kind, reverse)
    if device == "reference":
        out, h, c, _ = reference.recurrence(*call)
    else:
        out, h, c, _ = torch.ops.kruify.recurrence(*call, True, products)
    results = [out, h, *([c] if kind == "lstm" else [])]
    torch.manual_seed(7)
    weights = [torch.randn(r.shape, dtype=torch.float64).to(where, dtype) for r in results]
    if device == "cpu":
        weights = [guarded(w) for w in weights]
    seen = [k for k in range(len(results)) if k not in without]
    grads = torch.autograd.grad(
        [results[k] for k in seen], [t for t in leaves if t is not None], [weights[k] for k in seen],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return [*results, *grads]


def parity(
    m: Any, kind: str, sizes: list[int], reverse: bool, dtype: torch.dtype, device: str, columns: int = 0,
    products: int = precision.FLOAT32, without: tuple[int, ...] = (), allowed: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """Holds a recurrence and all its gradients against the reference; returns them."""
    given = inputs(m, kind, sizes, columns=columns)
    found = run(m, kind, given, reverse, device, dtype, products, without)
    expected = run(m, kind, given, reverse, "reference", torch.float64, without=without)
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        close(f"result {k}", got, wanted, allowed or LOWER.get(products, TOLERANCE[dtype]))
    return found
