"""What a recurrent layer was called with and what the dense layer gave, cut into pieces and kept in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from kruify.conversion.calibration import padded
from kruify.layers import KRULSTMCell
from kruify.layers.cells import KRUCellBase
from kruify.tasks.base import device_of

PIECE = 100
"""Steps of a sequence that are trained on at once."""
States = tuple[Tensor, ...]
Rows = NDArray[np.float32]


class Call(NamedTuple):
    """What a recurrent layer, or a cell, was called with.

    Attributes:
        input: (time, batch, features); a cell takes one step.
        lengths: (batch,), the steps of each sequence that are no padding; on the CPU.
        states: h, or h and c, each (layers * directions, batch, size).
    """

    input: Tensor
    lengths: Tensor
    states: States


def is_cell(layer: nn.Module) -> bool:
    """Whether a recurrent layer takes one step a call."""
    return isinstance(layer, nn.RNNCellBase | KRUCellBase)


def call_of(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What the arguments of one call say of a recurrent layer or cell, torch.nn's or kruify's."""
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x, state = given["input"], given.get("hx")
    if is_cell(layer):
        x = x.reshape(1, -1, layer.input_size)
        shape = (1, x.shape[1], layer.hidden_size)
        if state is None:
            state = (x.new_zeros(shape),) * (1 + isinstance(layer, nn.LSTMCell | KRULSTMCell))
        lengths = torch.ones(x.shape[1], dtype=torch.int64)
        return Call(x, lengths, tuple(s.reshape(shape) for s in _tuple(state)))
    x, lengths, state = padded(layer, x, state)
    return Call(x, lengths.cpu(), _tuple(state))


def run(layer: Any, call: Call) -> tuple[Tensor, States]:
    """Output (time, batch, size) and final states of a layer or cell; what stands after `lengths` does not count."""
    x, lengths, states = call
    if is_cell(layer):
        states = tuple(s[0] for s in states)
        final = _tuple(layer(x[0], states if len(states) == 2 else states[0]))
        return final[0][None], tuple(s[None] for s in final)
    state = states if len(states) == 2 else states[0]
    if layer.bidirectional and int(lengths.min()) < len(x):
        packed, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(packed, total_length=len(x))[0], _tuple(state)
    output, state = layer(x.transpose(0, 1) if layer.batch_first else x, state)
    return output.transpose(0, 1) if layer.batch_first else output, _tuple(state)


class Pieces:
    """Pieces of at most `PIECE` steps, each with the dense layer's states before it and its outputs, in files.

    A layer of one direction carries its state from piece to piece; one of two takes every piece of a longer sequence
    for a sequence by itself.

    Args:
        dense: the layer or cell whose outputs are learnt.
        folder: for the files, which are mapped into memory: what is not needed need not stay there.

    Attributes:
        train, held_out: numbers of the pieces to train on, and of those that tell how well.
        bytes: in the files.
        finite: whether all numbers are.
    """

    def __init__(self, dense: nn.Module, folder: Path) -> None:
        self.dense, self.bytes, self.finite = dense, 0, True
        self.train, self.held_out = list[int](), list[int]()
        self._carries = not (is_cell(dense) or dense.bidirectional)
        self._places: list[tuple[int, int]] = []  # first step, number of steps
        self._steps = 0
        self._shapes: list[torch.Size] = []  # of the states of one sequence
        self._files = [folder / name for name in ("inputs", "targets", "states")]
        for file in self._files:
            file.write_bytes(b"")
        self._maps: list[Rows] = []

    @torch.no_grad()
    def record(self, original: Call, given: Tensor, *, held_out: bool) -> None:
        """Adds one call of the dense layer in the dense network, and what the converted layer is given instead:
        `given`, of the shape of `original.input`."""
        states = original.states
        for start in range(0, len(original.input), PIECE):
            left = (original.lengths - start).clamp(max=PIECE)
            rows = left > 0
            if not rows.any():
                break
            columns = rows.to(original.input.device).nonzero()[:, 0]
            part = slice(start, start + PIECE)
            if start and not self._carries:
                states = tuple(torch.zeros_like(s) for s in states)
            before = tuple(s[:, columns] for s in states)
            call = Call(original.input[part][:, columns], left[rows], before)
            output, final = run(self.dense, call)
            states = tuple(s.index_copy(1, columns, f) for s, f in zip(states, final, strict=True))
            self._add(given[part][:, columns], output, before, call.lengths.tolist(), held_out)

    def _add(self, given: Tensor, output: Tensor, before: States, lengths: list[int], held_out: bool) -> None:
        numbers = self.held_out if held_out else self.train
        self._shapes = [s[:, 0].shape for s in before]
        parts = [
            torch.cat([sequence[:n] for sequence, n in zip(tensor.unbind(1), lengths, strict=True)])
            for tensor in (given, output)
        ]
        parts.append(torch.cat([s.transpose(0, 1).flatten(1) for s in before], 1))
        self.finite &= all(bool(tensor.isfinite().all()) for tensor in parts)
        for file, tensor in zip(self._files, parts, strict=True):
            with file.open("ab") as stream:
                stream.write(tensor.float().contiguous().cpu().numpy().tobytes())
            self.bytes += tensor.numel() * 4
        for length in lengths:
            numbers.append(len(self._places))
            self._places.append((self._steps, length))
            self._steps += length
        self._maps = []

    def length(self, number: int) -> int:
        """Steps of one piece."""
        return self._places[number][1]

    def batch(self, numbers: list[int]) -> tuple[Call, Tensor, Tensor]:
        """What the converted layer is called with, the outputs to learn, (time, batch, size), and which of them count,
        (time, batch, 1); on the device and in the dtype of the dense layer."""
        if not self._maps:
            rows = (self._steps, self._steps, len(self._places))
            self._maps = [
                np.memmap(file, np.float32, "r").reshape(count, -1)
                for file, count in zip(self._files, rows, strict=True)
            ]
        inputs, targets, kept = self._maps
        device, dtype = device_of(self.dense), next(self.dense.parameters()).dtype

        def sequences(rows: Rows) -> Tensor:
            places = (self._places[number] for number in numbers)
            found = [torch.from_numpy(np.array(rows[first : first + length])) for first, length in places]
            return pad_sequence(found).to(device, dtype)

        lengths = torch.tensor([self._places[number][1] for number in numbers])
        x, target = sequences(inputs), sequences(targets)
        widths = [shape.numel() for shape in self._shapes]
        parts = torch.split(torch.from_numpy(kept[numbers]).to(device, dtype), widths, 1)
        states = tuple(
            part.reshape(-1, *shape).transpose(0, 1).contiguous()
            for part, shape in zip(parts, self._shapes, strict=True)
        )
        counts = torch.arange(len(x))[:, None, None] < lengths[:, None]
        return Call(x, lengths, states), target, counts.to(device)


def _tuple(state: Any) -> States:
    return state if isinstance(state, tuple) else (state,)
