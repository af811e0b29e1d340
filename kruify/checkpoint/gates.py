"""Gate orders and layouts of other frameworks, in one table, and the translation to torch's and back.

torch: LSTM i,f,g,o; GRU r,z,n; weights (gates*hidden, input). ONNX: LSTM i,o,f,c; GRU z,r,h; the same layout, one
more leading dimension for the directions, both biases in one row. Keras: LSTM i,f,c,o; GRU z,r,h; kernels
(input, gates*hidden).
Sources: the ONNX operator specification (LSTM, GRU, RNN); keras/src/layers/rnn/{lstm,gru,simple_rnn}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from kruify.checkpoint.tensors import LazyTensor

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

ORDER: dict[tuple[str, str], tuple[int, ...]] = {
    ("onnx", "lstm"): (0, 2, 3, 1),
    ("onnx", "gru"): (1, 0, 2),
    ("onnx", "rnn"): (0,),
    ("keras", "lstm"): (0, 1, 2, 3),
    ("keras", "gru"): (1, 0, 2),
    ("keras", "rnn"): (0,),
}
"""(framework, kind) -> for each of torch's gates in order, its place in that framework's order."""

ONNX_PARTS = {"W": ("weight_ih",), "R": ("weight_hh",), "B": ("bias_ih", "bias_hh")}
"""Weights of an ONNX node -> torch's tensors that are in each."""


def to_torch(tensor: Tensor, framework: str, kind: str) -> Tensor:
    """Reorder the gates along the first dimension, (gates*hidden, ...), to torch's order."""
    order = ORDER[framework, kind]
    return torch.cat([tensor.chunk(len(order))[gate] for gate in order])


def from_torch(tensor: Tensor, framework: str, kind: str) -> Tensor:
    """The inverse of `to_torch`."""
    order = ORDER[framework, kind]
    return torch.cat([tensor.chunk(len(order))[order.index(gate)] for gate in range(len(order))])


def computed(
    shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor], identity: Hashable = None
) -> LazyTensor:
    """A lazy tensor whose numbers are computed; contiguous, tied only to what has the same identity."""
    return LazyTensor(shape, dtype, lambda: load().contiguous(), identity)


def keras_cell(kind: str, parts: Mapping[str, LazyTensor], suffix: str) -> dict[str, LazyTensor]:
    """torch's tensors of a Keras cell.

    Args:
        parts: "kernel" (input, gates*hidden), "recurrent" (hidden, gates*hidden), maybe "bias": (gates*hidden,), or
            (2, gates*hidden) for a GRU that resets after the matmul.
        suffix: "_l0" or "_l0_reverse".

    A single bias becomes torch's bias_ih, and bias_hh is zero.
    """

    def weight(source: LazyTensor) -> LazyTensor:
        shape = (source.shape[1], source.shape[0])
        return computed(shape, source.dtype, lambda: to_torch(source.load().t(), "keras", kind))

    def bias(source: LazyTensor, row: int) -> LazyTensor:
        def load() -> Tensor:
            numbers = source.load()
            if numbers.dim() == 1:
                numbers = torch.stack([numbers, torch.zeros_like(numbers)])
            return to_torch(numbers[row], "keras", kind)

        return computed((source.shape[-1],), source.dtype, load)

    found = {f"weight_ih{suffix}": weight(parts["kernel"]), f"weight_hh{suffix}": weight(parts["recurrent"])}
    if "bias" in parts:
        found[f"bias_ih{suffix}"] = bias(parts["bias"], 0)
        found[f"bias_hh{suffix}"] = bias(parts["bias"], 1)
    return found


def keras_from_torch(kind: str, tensors: Mapping[str, Tensor], suffix: str, bias_rows: int) -> dict[str, Tensor]:
    """The inverse of `keras_cell`; with one bias row, torch's two biases are added (GRUs always have two)."""
    found = {
        "kernel": from_torch(tensors[f"weight_ih{suffix}"], "keras", kind).t(),
        "recurrent": from_torch(tensors[f"weight_hh{suffix}"], "keras", kind).t(),
    }
    if bias_rows:
        rows = [from_torch(tensors[f"bias_{side}{suffix}"], "keras", kind) for side in ("ih", "hh")]
        found["bias"] = rows[0] + rows[1] if bias_rows == 1 else torch.stack(rows)
    return found


def onnx_layer(kind: str, parts: Mapping[str, LazyTensor], directions: int) -> dict[str, LazyTensor]:
    """torch's tensors of an ONNX node.

    Args: parts: "W" (directions, gates*hidden, input), "R" (directions, gates*hidden, hidden), maybe "B"
        (directions, 2*gates*hidden). Nodes of one kind whose parts have one identity are tied.
    """

    def tie(source: LazyTensor, *which: int) -> Hashable:
        return source.identity and (source.identity, kind, *which)

    def weight(source: LazyTensor, d: int) -> LazyTensor:
        shape, same = source.shape[1:], tie(source, d)
        return computed(shape, source.dtype, lambda: to_torch(source.load()[d], "onnx", kind), same)

    def bias(source: LazyTensor, d: int, half: int) -> LazyTensor:
        shape, same = (source.shape[1] // 2,), tie(source, d, half)
        return computed(shape, source.dtype, lambda: to_torch(source.load()[d].chunk(2)[half], "onnx", kind), same)

    found: dict[str, LazyTensor] = {}
    for d, suffix in enumerate(("_l0", "_l0_reverse")[:directions]):
        found[f"weight_ih{suffix}"] = weight(parts["W"], d)
        found[f"weight_hh{suffix}"] = weight(parts["R"], d)
        if "B" in parts:
            found[f"bias_ih{suffix}"] = bias(parts["B"], d, 0)
            found[f"bias_hh{suffix}"] = bias(parts["B"], d, 1)
    return found


def onnx_from_torch(kind: str, part: str, tensors: Mapping[str, Tensor], directions: int) -> Tensor:
    """The inverse of `onnx_layer` for one part, "W", "R" or "B"."""

    def stacked(stem: str) -> Tensor:
        names = [stem + suffix for suffix in ("_l0", "_l0_reverse")[:directions]]
        return torch.stack([from_torch(tensors[name], "onnx", kind) for name in names])

    return torch.cat([stacked(stem) for stem in ONNX_PARTS[part]], 1)
