"""How much worse a metric may get: in its own units, or as a share of what the original network has."""

from __future__ import annotations

import math

from kruify.errors import UsageError


def allowed_drop(max_drop: float | str | None, value: float) -> float | None:
    """`max_drop` in the units of a metric: of "1%" a hundredth of `value`, the original network's.

    Raises:
        UsageError: it is neither a number nor a percentage, or the percentage is negative.
    """
    if not isinstance(max_drop, str):
        return max_drop
    number, percent = max_drop.strip().removesuffix("%"), max_drop.strip().endswith("%")
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found < 0:
        hint = "Write 0.01, in the metric's own units, or 1%, of the original network's value"
        raise UsageError(f"'{max_drop[:40]}' is no drop of a metric", "max_drop", hint)
    return abs(value) * found / 100 if percent else found
