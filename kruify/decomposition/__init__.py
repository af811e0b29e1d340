"""Dense matrix -> factors: nearest Kronecker products, their sums, diagonal and overlay, with exact errors."""

from __future__ import annotations

from kruify.decomposition.choose import choose
from kruify.decomposition.fit import Fit, fit, null_energy
from kruify.decomposition.symmetries import Relabelling, symmetries

__all__ = ["Fit", "Relabelling", "choose", "fit", "null_energy", "symmetries"]
