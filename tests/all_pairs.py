"""A small selection of cases that still meets every pair of option values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any


def all_pairs(allowed: Callable[..., bool] | None = None, **options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases of `options`, in their order, such that every pair of values that some allowed case holds occurs.

    Greedy and deterministic: the next case is the first of the product that meets most of the pairs left. `allowed`
    takes the options by name and says which cases exist.
    """
    bits: dict[object, int] = {}  # one per pair of (option, place of its value)
    candidates = []  # (case, the bits of its pairs)
    for places in itertools.product(*(range(len(values)) for values in options.values())):
        case = tuple(values[place] for values, place in zip(options.values(), places, strict=True))
        if allowed is None or allowed(**dict(zip(options, case, strict=True))):
            met = sum(1 << bits.setdefault(p, len(bits)) for p in itertools.combinations(enumerate(places), 2))
            candidates.append((case, met))
    left, chosen = (1 << len(bits)) - 1, []
    while left:
        case, met = max(candidates, key=lambda candidate: (candidate[1] & left).bit_count())
        chosen.append(case)
        left &= ~met
    return chosen
