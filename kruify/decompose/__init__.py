"""Dense matrix -> factors: nearest Kronecker products, their sums, diagonal and overlay, with exact errors."""

from __future__ import annotations

from kruify.decompose.fit import Fit, fit, null_energy

__all__ = ["Fit", "fit", "null_energy"]
