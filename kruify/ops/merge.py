"""`merge`: consecutive factors of a term multiplied into the stages that the kernels run."""

from __future__ import annotations

from torch import Tensor

from kruify.ops import reference
from kruify.ops.registration import define


def _merge(factors: list[Tensor], scale: Tensor | None, groups: list[int]) -> list[Tensor]:
    return [s.clone() if any(s is f for f in factors) else s for s in reference.merge(factors, scale, groups)]


define("merge", "(Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]", _merge)
define("merge_backward", "(Tensor[] grads, Tensor[] factors, Tensor? scale, int[] groups) -> Tensor[]")
