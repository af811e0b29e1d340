"""Dense matrix -> factors: nearest Kronecker products, their sums, diagonal and sparse residual, with exact errors."""

from __future__ import annotations

from kruify.decomposition.fitting import Fit, fit, null_energy

__all__ = ["Fit", "fit", "null_energy"]
