"""Dense matrix -> factors: nearest Kronecker products, their sums, diagonal and overlay, with exact errors."""

from __future__ import annotations

from kruify.decompose.choose import choose
from kruify.decompose.fit import Fit, fit, null_energy
from kruify.decompose.symmetries import Relabelling, symmetries

__all__ = ["Fit", "Relabelling", "choose", "fit", "null_energy", "symmetries"]
