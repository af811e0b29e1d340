"""What the tests of the phases have in common: cases, and the comparison with the float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kruify import ops as ops  # registers the operators
from kruify.ops import reference

KINDS = tuple(reference.GATES)
FIXED_SHAPES = ((16, 16), (32, 16), (32, 32), (64, 32), (64, 64))
SIZES = {"equal": [2, 2, 2], "packed": [3, 2, 2, 1]}
FP32 = {"rtol": 1e-4, "atol": 2e-5}
FP64 = {"rtol": 1e-9, "atol": 1e-10}


def compare(name: str, got: Tensor | None, wanted: Tensor | None, tolerance: dict[str, float]) -> None:
    if wanted is None:
        assert got is None
        return
    wanted = wanted.to(got.dtype)  # type: ignore[union-attr]
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(
        got, wanted, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale, msg=lambda m: f"{name}: {m}"
    )


def check(
    phases: Any, m: Any, kind: str, sizes: list[int], reverse: bool, dtype: torch.dtype, o: Any,
    without: tuple[int, ...] = (), tolerance: dict[str, float] | None = None,
) -> tuple[int, tuple[Any, ...]]:  # fmt: skip
    """Forward and backward against the reference; returns how many launches took two-stage templates, and outputs."""
    m = m.of_kind(kind)
    batch_sizes = torch.tensor(sizes, dtype=torch.int64)
    total, batch, hidden = sum(sizes), sizes[0] if sizes else 2, m.layout.rows
    x = torch.randn(total, m.layout.gates * hidden, dtype=torch.float64)
    h0 = torch.randn(batch, hidden, dtype=torch.float64) / 2
    c0 = torch.randn(batch, hidden, dtype=torch.float64) / 2 if kind == "lstm" else None
    grads = [torch.randn(total, hidden, dtype=torch.float64), torch.randn(batch, hidden, dtype=torch.float64)]
    grads += [torch.randn(batch, hidden, dtype=torch.float64) if kind == "lstm" else None]
    grads = [None if k in without else g for k, g in enumerate(grads)]
    inputs = [x, h0, c0, *m.stages, m.diagonal, m.residual, m.bias]
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    x1, h1, c1, *stages, diagonal, residual, bias = leaves
    wanted = reference.recurrence(
        x1, None, None, batch_sizes, h1, c1, stages, diagonal, residual, m.index, bias, m.layout.encode(), kind, reverse
    )
    pairs = [(y, g) for y, g in zip(wanted, grads, strict=False) if y is not None and g is not None]
    present = [t for t in leaves if t is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], present, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
    )
    expected = [None if t is None else next(found) for t in leaves]

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    own = m.to(dtype)
    out = phases.recurrence(cast(x), batch_sizes, cast(h0), cast(c0), own, kind, reverse, o)
    templates = phases.templates
    tolerance = tolerance or (FP32 if dtype == torch.float32 else FP64)
    for name, got, want in zip(("out", "h", "c", "workspace"), out, wanted, strict=True):
        compare(name, got, None if want is None else want.detach(), tolerance)
    dx, dh, dc, rest = phases.recurrence_backward(
        *map(cast, grads), out[0], out[3], batch_sizes, cast(h0), cast(c0), own, kind, reverse, o
    )
    for name, got, want in zip(("grad_gates", "grad_h0", "grad_c0"), (dx, dh, dc), expected[:3], strict=True):
        compare(name, got, want, tolerance)
    for k, (got, want) in enumerate(zip(rest, [e for e in expected[3:] if e is not None], strict=True)):
        compare(f"gradient {k} of the matrix", got, want, tolerance)
    return templates, (*out, dx, dh, dc, *rest)


def pair(kind: str, rows1: int, rows2: int, rank: int) -> tuple[Any, ...]:
    """Arguments of the fixture `matrix`: one term of two square stages for all gates."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    return gates, rows1 * rows2, rows1 * rows2, [(range(gates), rank, [(rows1, rows1), (rows2, rows2)])]
