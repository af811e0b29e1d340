"""The arithmetic of the eight-bit operators in numpy: integers as they are, everything else in float32 or float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray  # any dtype
F32 = np.float32


def rounded(rows: Array) -> tuple[Array, Array]:
    """(n, k) float32 -> integers (n, k) and scales (n,), as vectors are rounded on their way into a product."""
    largest = np.abs(rows).max(1)
    inverse = np.where(largest > 1e-30, F32(127) / np.maximum(largest, F32(1e-30)), F32(0)).astype(F32)
    return np.rint(rows * inverse[:, None]).astype(np.int64), (largest / F32(127)).astype(F32)


def packed(rows: Array) -> tuple[Array, Array]:
    """(n, k) float32 -> integers (n, k) and scales (n,), as weights are."""
    largest, whole = np.abs(rows).max(1), (rows == np.rint(rows)).all(1)
    scale = np.where(whole & (largest > 0) & (largest <= 127), F32(1), largest / F32(127)).astype(F32)
    return np.rint(rows / np.where(scale > 0, scale, F32(1))[:, None]).astype(np.int64), scale


def product(x: Array, weight: Array) -> Array:
    """x (n, k), weight (m, k) -> (n, m) float32."""
    q, scales = rounded(x)
    w, rows = packed(weight)
    return (q @ w.T).astype(F32) * (rows * scales[:, None]).astype(F32)


@dataclass
class Matrix:
    """(gates * rows, cols): `second`, or second first, where a gate takes `spans[gate]` of first's rows."""

    second: Array  # (gates * rows, most columns)
    spans: list[tuple[int, int]]  # of each gate first and number of columns
    cols: int
    first: Array | None = None  # (rank, cols)

    @property
    def layout(self) -> list[int]:
        rank = 0 if self.first is None else len(self.first)
        rows = len(self.second) // len(self.spans)
        return [len(self.spans), rows, self.cols, rank, *(n for span in self.spans for n in span)]

    def multiply(self, x: Array) -> Array:
        """x (n, cols) float32 -> (n, gates * rows) float32."""
        z = x if self.first is None else product(x, self.first)
        q, scales = rounded(z)
        parts = []
        for (start, count), weight in zip(self.spans, np.split(self.second, len(self.spans)), strict=True):
            w, rows = packed(weight[:, :count])
            sums = q[:, start : start + count] @ w.T
            parts.append(sums.astype(F32) * (rows * scales[:, None]).astype(F32))
        return np.concatenate(parts, axis=1)

    def dense(self) -> Array:
        """The float64 matrix of the rounded weights."""
        exact = [(q * s.astype(np.float64)[:, None]) for q, s in (packed(w) for w in self._blocks())]
        if self.first is None:
            return np.concatenate(exact)
        q, scale = packed(self.first)
        first = q * scale.astype(np.float64)[:, None]
        return np.concatenate([w @ first[a : a + n] for w, (a, n) in zip(exact, self.spans, strict=True)])

    def _blocks(self) -> list[Array]:
        weights = np.split(self.second, len(self.spans))
        return [w[:, :count] for w, (_, count) in zip(weights, self.spans, strict=True)]


def _sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def cell(kind: str, gates_x: Array, gates_h: Array, bias: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """One step in float64: the input's share (n, gates * H), that of h, b_hh, h and c (n, H) -> h, c."""
    if kind == "gru":
        (xr, xz, xn), (r, z, n) = (np.split(a, 3, axis=1) for a in (gates_x, gates_h + bias))
        r, z = _sigmoid(xr + r), _sigmoid(xz + z)
        new = np.tanh(xn + r * n)
        return new + z * (h - new), c
    total = gates_x + gates_h + bias
    if kind == "lstm":
        i, f, g, o = np.split(total, 4, axis=1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c
    return (np.tanh(total) if kind == "rnn_tanh" else np.maximum(total, 0)), c
