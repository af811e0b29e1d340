"""Dense matrix -> factors: nearest Kronecker products, their sums, diagonal and overlay, with exact errors."""

from __future__ import annotations

from kruify.decomposition.choose import choose
from kruify.decomposition.fit import Fit, fit, null_energy

__all__ = ["Fit", "choose", "fit", "null_energy"]
