"""`merge`: consecutive factors of a term multiplied into the stages that the kernels run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kruify.ops import reference
from kruify.ops.registration import autograd_inside, check, define, empty_grads, gradients, present


def _merge(factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    return [s.clone() if any(s is f for f in factors) else s for s in reference.merge(factors, scale, groups)]


def _merge_fake(factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    check(sum(groups) == len(factors) and min(groups) > 0, "merge: groups do not cover the factors")
    stages, start = [], 0
    for size in groups:
        rows = cols = 1
        for factor in factors[start : start + size]:
            rows, cols = rows * factor.shape[2], cols * factor.shape[3]
        stages.append(factors[start].new_empty(*factors[start].shape[:2], rows, cols))
        start += size
    return stages


def _backward(grads: list[Tensor], factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    def function(inputs: list[Any]) -> list[Tensor]:
        return reference.merge(inputs[:-1], inputs[-1], groups)

    with autograd_inside():
        return [g.clone() for g in present(*gradients(function, [*factors, scale], grads))]


def _backward_fake(grads: list[Tensor], factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    return empty_grads(*factors, scale)


define("merge", "(Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]", _merge, _merge_fake)
define(
    "merge_backward",
    "(Tensor[] grads, Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]",
    _backward,
    _backward_fake,
)
