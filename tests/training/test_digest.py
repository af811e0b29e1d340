"""Different samples have different digests, equal ones the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kruify.training.digest import Digest


def digest(value: Any) -> str:
    found = Digest()
    found.add(value)
    return found.hex()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array("a text"), np.array("another")),
        (np.array(["a", "b"], dtype=object), np.array(["a", "c"], dtype=object)),
        (np.int64(1), np.int64(2)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        ([1, [2, 3]], [[1, 2], 3]),
        ({"x": torch.ones(1)}, {"y": torch.ones(1)}),
    ],
)
def test_digest(one: Any, other: Any) -> None:
    assert digest(one) == digest(one) != digest(other)
