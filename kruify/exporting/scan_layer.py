"""A recurrent layer whose loop over time torch.export can keep: `torch`'s scan operator instead of a Python loop."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from kruify.conversion import build_layer
from kruify.conversion.locate import MODULES, describe
from kruify.conversion.plan import LayerPlan
from kruify.errors import UnsupportedError
from kruify.layers import reference
from kruify.layers.backend import Sequences, Weights, run_each_direction
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase
from kruify.layers.recurrent import RecurrentLayer
from kruify.ops.reference import State


class ScanLayer(nn.Module):
    """Stands in for a KRURNN, KRULSTM or KRUGRU while a model is traced, with its interface but for packed sequences.

    The traced program keeps the factors, has dynamic batch and time, and consists of torch's own operators only: it
    loads where kruify is not installed.
    """

    def __init__(self, layer: KRUBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch.nn.LSTM: (time, batch, features), or (batch, time, features) with batch_first, or unbatched."""
        if not isinstance(input, Tensor):
            name = type(self.layer).__name__
            raise UnsupportedError("a packed sequence cannot be traced", name, "Export the layer alone")
        return self.layer.compute(input, hx, lambda *_: ScanBackend())


class ScanBackend:
    """The backend of a traced layer: kruify.layers.reference with scan as the loop."""

    def run(self, layer: RecurrentLayer, input: Sequences, state: State) -> tuple[Tensor, State]:
        return run_each_direction(layer, input.padded(), state, partial(scan_direction, layer.kernel_kind))


def scan_direction(
    kind: str,
    weights: Weights,
    x: Tensor,  # (time, batch, features)
    state: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction."""
    from torch._higher_order_ops.scan import scan

    def combine(carry: list[Tensor], gates: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = reference.step(kind, weights, gates[0], tuple(carry))
        return list(new), [new[0].clone()]  # an output of scan may not be its carry, too

    gates_x = reference.input_gates(kind, weights, x)
    final, sequence = scan(combine, [s.clone() for s in state], [gates_x], dim=0, reverse=reverse)
    return sequence[0], tuple(final)


class StepCell(nn.Module):
    """Stands in for a KRU cell while a model is traced: the same step without kruify's operators."""

    def __init__(self, cell: KRUCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch.nn.LSTMCell, GRUCell or RNNCell."""
        cell = self.cell
        x, state = cell.batched(input, (hx,) if isinstance(hx, Tensor) else hx)
        new = reference.step_from_input(cell.kernel_kind, cell.weights(), x, state)
        new = new if input.dim() == 2 else tuple(s.squeeze(0) for s in new)
        return new if len(new) == 2 else new[0]


def traceable(model: nn.Module) -> nn.Module:
    """`model` with its recurrent layers replaced by their `ScanLayer`, KRU cells by their `StepCell`, in place.

    torch.nn's own layers, too: traced as they are, they would be unrolled over the length of the example.
    """
    if isinstance(model, KRUBase):
        return ScanLayer(model)
    if isinstance(model, KRUCellBase):
        return StepCell(model)
    if type(model) in MODULES:
        return _of_torch(model)
    for name, child in list(model.named_children()):
        setattr(model, name, traceable(child))
    return model


def _of_torch(module: nn.Module) -> nn.Module:
    """A KRU layer without a Kronecker matrix in it is torch.nn's layer with a loop that can be kept."""
    description = describe("", module)
    if description.cell:
        return module
    layer = build_layer(LayerPlan(description, {}))
    layer.load_state_dict(module.state_dict())
    assert isinstance(layer, KRUBase)
    return ScanLayer(layer).train(module.training)
