"""What a CUDA graph of some steps is fed with, and what comes of it; instead of a graph the steps run again on the CPU.
test_gpu.py has the graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import inputs, low_rank
from torch import Tensor

from kruify import ops as ops  # registers the operators
from kruify.ops import graphs


def again(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """As a graph does: the result stays where it is."""
    out = run()

    def replay() -> None:
        out.copy_(run())

    return out, replay


@pytest.mark.parametrize("steps", [64, 70])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_steps_give_what_the_whole_sequence_gives(matrix, kind, reverse, steps) -> None:  # type: ignore[no-untyped-def]
    """Also with other inputs and weights than those that they were recorded for."""
    kept = None
    for seed in range(2):
        torch.manual_seed(seed)
        m = matrix(*low_rank(kind, 8, 2), diagonal=(0,), residual=3)
        x, _, _, sizes, h0, c0 = inputs(m, kind, [3] * steps)
        call = (x, None, None, sizes, h0, c0, *m.arguments(), kind, reverse, False, 0)
        kept = kept or graphs.Steps(call, again)
        wanted = torch.ops.kruify.recurrence_forward.default(*call)
        for got, one in zip(kept(call), wanted, strict=False):
            torch.testing.assert_close(got, one)


@pytest.mark.parametrize(
    ("device", "grad", "steps", "rows", "kept"),
    [("cuda", False, 32, 96, True), ("cpu", False, 32, 96, False), ("cuda", True, 32, 96, False),
     ("cuda", False, 31, 93, False), ("cuda", False, 32, 90, False)],
)  # fmt: skip
def test_what_may_be_kept(device: str, grad: bool, steps: int, rows: int, kept: bool) -> None:
    """Long enough sequences of one length, on a GPU, without derivatives."""
    with torch._subclasses.FakeTensorMode(), torch.set_grad_enabled(grad):
        assert graphs.keeps(torch.empty(rows, 5, device=device), steps, 3) is kept
