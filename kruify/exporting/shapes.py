"""What an exported layer takes and gives: names and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kruify.conversion import describe_kru
from kruify.conversion.locate import MODULES, RecurrentLayer, describe
from kruify.errors import UnsupportedError, UsageError
from kruify.layers import KRU
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase

LENGTHS = "lengths"
"""The input of an ONNX layer that says how many steps of each sequence count: (batch,), int64; it may be left out."""


@dataclass(frozen=True)
class Interface:
    """Inputs `input`, `h_0` (and `c_0` for an LSTM); outputs `output`, `h_n` (`c_n`). A cell is one step: `input`, `h`
    (`c`) in, `h_1` (`c_1`) out. Time and batch are dynamic."""

    layer: RecurrentLayer

    @property
    def cell(self) -> bool:
        return self.layer.cell

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c") if self.layer.kind == "lstm" else ("h",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("input", *(f"{s}_0" for s in self.states))

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.cell:
            return tuple(f"{s}_1" for s in self.states)
        return ("output", *(f"{s}_n" for s in self.states))

    @property
    def directions(self) -> int:
        return 2 if self.layer.bidirectional else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.layer.output_size, self.layer.hidden_size)[: len(self.states)]

    def input_shapes(self, steps: int | str, batch: int | str) -> list[tuple[int | str, ...]]:
        """Shapes of the inputs; `steps` and `batch` may be names of dynamic axes."""
        if self.cell:
            return [(batch, self.layer.input_size), *((batch, size) for size in self.state_sizes)]
        rows = self.layer.num_layers * self.directions
        leading = (batch, steps) if self.layer.batch_first else (steps, batch)
        return [(*leading, self.layer.input_size), *((rows, batch, size) for size in self.state_sizes)]

    def output_shapes(self, steps: int | str, batch: int | str) -> list[tuple[int | str, ...]]:
        """Shapes of the outputs."""
        inputs = self.input_shapes(steps, batch)
        if self.cell:
            return inputs[1:]
        return [(*inputs[0][:2], self.layer.output_size * self.directions), *inputs[1:]]

    def axes(self) -> list[dict[int, str]]:
        """Dynamic axes of the inputs: axis -> "time" or "batch"."""
        shapes = self.input_shapes("time", "batch")
        return [{axis: size for axis, size in enumerate(shape) if isinstance(size, str)} for shape in shapes]


def no_kru(where: object) -> UnsupportedError:
    """The error for a `KRU`, which is not exported."""
    return UnsupportedError(
        "a Kronecker Recurrent Unit is not exported: torch.nn and ONNX have no such layer",
        where or None,
        "Load it with kruify.load",
    )


def interface_of(module: nn.Module, name: str = "") -> Interface:
    """The interface of a recurrent module, KRU or torch.nn's.

    Raises:
        UsageError: it is neither.
        UnsupportedError: it is the unit itself, whose state and modReLU other formats do not know.
    """
    if isinstance(module, KRU):
        raise no_kru(name)
    if isinstance(module, KRUBase | KRUCellBase):
        return Interface(describe_kru(name, module))
    if isinstance(module, tuple(MODULES)):
        return Interface(describe(name, module))
    raise UsageError(f"a {type(module).__name__} is no recurrent layer", name or None, "Export its RNN, LSTM or GRU")
