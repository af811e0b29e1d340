"""How much worse a metric may get: in its own units, or as a share of what the original network has."""

from __future__ import annotations

import math

from kruify.errors import TaskError, UsageError


def drop_from(baseline: float, value: float, higher_is_better: bool) -> float:
    """How much worse a metric is than the original network's, negative if better; what is NaN is infinitely worse."""
    if math.isnan(value):
        return math.inf
    return baseline - value if higher_is_better else value - baseline


def allowed_drop(max_drop: float | str | None, value: float) -> float | None:
    """`max_drop` in the units of a metric: of "1%" a hundredth of `value`, the original network's.

    Raises:
        UsageError: it is neither a number nor a percentage, or the percentage is negative. TaskError: `value` is no
            finite number, so that nothing can be compared with it.
    """
    if max_drop is not None and not math.isfinite(value):
        what = f"the metric of the original network is {value}"
        raise TaskError(what, "max_drop", "Leave it out, or give a metric that is a finite number")
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
