"""Recurrences that a GPU takes step by step (csrc/cuda/stepwise.h), with their launches kept in a CUDA graph: without
one the host needs longer for a step's launches than the GPU for its work.

A graph holds STEPS steps, however long the sequences are. All that it reads, weights among it, is copied to where it
reads, so that it serves every call of the same sizes; it is recorded when they come a second time. Inference alone, and
sequences of one length. Someone else's capture gets the launches themselves.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify.ops.functions import traced, training

STEPS = 32
KEPT = 4
"""Graphs in a process: each holds its weights, and STEPS steps of gates and outputs."""

Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


def keeps(x: Tensor, steps: int, batch: int) -> bool:
    """Whether the launches of a recurrence over x, (rows, features) or (steps, batch, features), may be kept."""
    if not x.is_cuda or training() or traced() or steps < STEPS:
        return False
    return x.shape[:-1].numel() == steps * batch


def recurrence(*call: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    """The operator `recurrence_forward` for inputs that `keeps` takes; the fourth result, for training, is None."""
    x, w_ih, bias_ih, sizes, h0, c0, *matrix = call
    if w_ih is not None:
        x = F.linear(x, w_ih, bias_ih)
    elif bias_ih is not None:
        x = x + bias_ih
    call = (x, None, None, sizes, h0, c0, *matrix)
    found = None if torch.cuda.is_current_stream_capturing() else _steps_for(call)
    if found is None:
        return *torch.ops.kruify.recurrence_forward.default(*call)[:3], None
    return *found, None


_known: OrderedDict[Any, Steps | bool] = OrderedDict()  # by sizes and stream; False: seen once; True: cannot be kept
_lock = threading.Lock()  # a graph's inputs belong to one call until it is on its way


def _steps_for(call: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The results, or None where there is no graph for these sizes."""
    x, _, _, _, h0, c0, stages, *rest = call
    sizes = [None if t is None else (t.shape, t.dtype) for t in (h0, c0, *stages, *rest[:4])]
    key = (*sizes, x.shape[1], tuple(rest[4]), *rest[5:], torch.cuda.current_stream(x.device))
    with _lock, torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
        found: Steps | bool = _known.pop(key) or _kept(call) if key in _known else False
        _known[key] = found
        while len(_known) > KEPT:
            _known.popitem(last=False)
        return found(call) if isinstance(found, Steps) else None


def _kept(call: tuple[Any, ...]) -> Steps | bool:
    try:
        return Steps(call, _record)
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph could be recorded, launches go one by one: {error}", RuntimeWarning, stacklevel=2)
        return True


class Steps:
    """STEPS steps of a recurrence, recorded once, and replayed for sequences of any length."""

    def __init__(self, call: tuple[Any, ...], record: Record) -> None:
        x, _, _, _, h0, c0, stages, *rest = call
        self.rows = STEPS * h0.shape[0]
        self.x = x.new_empty(self.rows, x.shape[1])
        self.sizes = torch.full((STEPS,), h0.shape[0], device="cpu")
        self.h, self.c = torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)
        self.stages = [torch.empty_like(stage) for stage in stages]
        self.beside = [None if t is None else torch.empty_like(t) for t in rest[:4]]
        self.options = rest[4:]
        self._take(call)
        self.x.zero_()
        self.out, self.replay = record(self._run)

    def _run(self) -> Tensor:
        out: Tensor
        out, h, c, _ = torch.ops.kruify.recurrence_forward.default(
            self.x, None, None, self.sizes, self.h, self.c, self.stages, *self.beside, *self.options
        )
        self.h.copy_(h)
        if self.c is not None:
            self.c.copy_(c)
        return out

    def _take(self, call: tuple[Any, ...]) -> None:
        """Copies states and weights to where the steps read them."""
        _, _, _, _, h0, c0, stages, *rest = call
        own = self.h, self.c, *self.stages, *self.beside
        for to, given in zip(own, (h0, c0, *stages, *rest[:4]), strict=True):
            if to is not None:
                to.copy_(given)

    def __call__(self, call: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """out (rows, H), hT (B, H), cT (B, H); the last is empty but for an LSTM."""
        self._take(call)
        x, reverse = call[0], call[13]
        out, rest = x.new_empty(x.shape[0], self.h.shape[1]), x.shape[0] % self.rows
        whole = range(rest if reverse else 0, x.shape[0] - (0 if reverse else rest), self.rows)
        for first in reversed(whole) if reverse else whole:
            self.x.copy_(x[first : first + self.rows])
            self.replay()
            out[first : first + self.rows] = self.out
        if not rest:
            return out, self.h.clone(), self.h.new_empty(0) if self.c is None else self.c.clone()
        part = slice(0, rest) if reverse else slice(x.shape[0] - rest, None)
        sizes = self.sizes[: rest // self.h.shape[0]]
        out[part], h, c, _ = torch.ops.kruify.recurrence_forward.default(
            x[part], None, None, sizes, self.h, self.c, *call[6:]
        )
        return out, h, c


def _record(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """A CUDA graph of what `run` does on the current stream: its result, and what replays it."""
    current = torch.cuda.current_stream()
    side = _sides.setdefault(current, torch.cuda.Stream())  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):  # a capture that fails does not leave its stream itself
        run()  # what is made at first use, as cuBLAS' workspace, is not made within the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = run()
    current.wait_stream(side)
    return out, graph.replay


_sides: dict[Any, Any] = {}  # of each stream the one that its graphs are recorded on: no other uses its workspace
