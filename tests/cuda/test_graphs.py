"""What a CUDA graph of some steps is fed with, and what comes of it; instead of a graph the steps run again on the CPU.
test_gpu.py has the graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext

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


@pytest.mark.parametrize("fails", [False, True])
def test_the_second_call_of_the_same_sizes_records(matrix, monkeypatch, fails) -> None:  # type: ignore[no-untyped-def]
    """And those of other sizes push it out in the end. Where recording fails a warning says so, and the launches go one
    by one."""
    recorded = []

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        recorded.append(run)
        if fails:
            raise RuntimeError("no graph on this machine")
        return again(run)

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs, "_known", OrderedDict())
    for name, found in (("current_stream", 0), ("device", nullcontext()), ("is_current_stream_capturing", False)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    m = matrix(*low_rank("lstm", 8, 2))

    def run(batch: int) -> None:
        x, w, b, sizes, h0, c0 = inputs(m, "lstm", [batch] * 40, columns=5)
        call = (x, w, b, sizes, h0, c0, *m.arguments(), "lstm", False, False, 0)
        for got, wanted in zip(graphs.recurrence(*call)[:3], torch.ops.kruify.recurrence_forward(*call), strict=False):
            torch.testing.assert_close(got, wanted)

    run(3)
    assert not recorded
    with pytest.warns(RuntimeWarning, match="no graph on this machine") if fails else nullcontext():
        run(3)
    for batch in (3, *range(4, 4 + graphs.KEPT)):
        run(batch)
    assert len(recorded) == 1 and len(graphs._known) == graphs.KEPT and not any(graphs._known.values())


@pytest.mark.parametrize(
    ("device", "grad", "steps", "rows", "kept"),
    [("cuda", False, 32, 96, True), ("cpu", False, 32, 96, False), ("cuda", True, 32, 96, False),
     ("cuda", False, 31, 93, False), ("cuda", False, 32, 90, False)],
)  # fmt: skip
def test_what_may_be_kept(device: str, grad: bool, steps: int, rows: int, kept: bool) -> None:
    """Long enough sequences of one length, on a GPU, without derivatives."""
    with torch._subclasses.FakeTensorMode(), torch.set_grad_enabled(grad):
        assert graphs.keeps(torch.empty(rows, 5, device=device), steps, 3) is kept
