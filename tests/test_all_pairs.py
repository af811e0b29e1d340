"""The selection of cases: every allowed pair of values occurs, in far fewer cases than the product has."""

from __future__ import annotations

import itertools

from all_pairs import all_pairs


def test_every_allowed_pair_of_values_occurs() -> None:
    options = {"kind": "abc", "layers": (1, 2), "bias": (False, True), "mode": "wxyz"}

    def allowed(kind: str, layers: int, bias: bool, mode: str) -> bool:
        return bias or kind == "a"

    cases = all_pairs(allowed, **options)
    product = [case for case in itertools.product(*options.values()) if allowed(*case)]
    for first, second in itertools.combinations(range(4), 2):
        assert {(c[first], c[second]) for c in cases} == {(c[first], c[second]) for c in product}
    assert set(cases) <= set(product) and len(cases) < len(product) / 2
    assert cases == all_pairs(allowed, **options)
