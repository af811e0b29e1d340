"""A recurrent layer whose loop over time torch.export can keep: `torch`'s scan operator instead of a Python loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.conversion import build_layer
from kruify.conversion.locate import MODULES, describe
from kruify.conversion.plan import LayerPlan
from kruify.errors import UnsupportedError
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.steps import Matrix, State, make_step


class ScanLayer(nn.Module):
    """Stands in for a KRURNN, KRULSTM or KRUGRU while a model is traced, with its interface but for packed sequences.

    The traced program keeps the factors, has dynamic batch and time, and consists of torch's own operators only: it
    loads where kruify is not installed.
    """

    def __init__(self, layer: KRUBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """As torch.nn.LSTM: (time, batch, features), or (batch, time, features) with batch_first, or unbatched."""
        layer = self.layer
        if not isinstance(input, Tensor):
            raise UnsupportedError("a packed sequence cannot be traced", type(layer).__name__, "Export the layer alone")
        unbatched = input.dim() == 2
        x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if layer.batch_first else input
        state = layer._initial_state(hx, x, x.shape[1], unbatched)
        finals: list[State] = []
        for k in range(layer.num_layers):
            outputs = []
            for d in range(layer.num_directions):
                index = k * layer.num_directions + d
                output, final = self._direction(x, tuple(s[index] for s in state), k, d)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        state = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if unbatched:
            x, state = x.squeeze(1), tuple(s.squeeze(1) for s in state)
        elif layer.batch_first:
            x = x.transpose(0, 1)
        return x, layer._pack_state(state)

    def _direction(self, x: Tensor, state: State, k: int, d: int) -> tuple[Tensor, State]:
        from torch._higher_order_ops.scan import scan

        w: Any = self.layer.weights(k, d)
        gates_x = _affine(w["weight_ih"], x, w["bias_ih"])
        step = make_step(
            self.layer.kind, _multiply(w["weight_hh"]), w["bias_hh"], w["weight_hr"], self.layer.nonlinearity
        )

        def combine(carry: list[Tensor], gates: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            new = step(gates[0], tuple(carry))
            return list(new), [new[0].clone()]  # an output of scan may not be its carry, too

        final, sequence = scan(combine, [s.clone() for s in state], [gates_x], dim=0, reverse=d == 1)
        return sequence[0], tuple(final)


class StepCell(nn.Module):
    """Stands in for a KRU cell while a model is traced: the same step without kruify's operators."""

    def __init__(self, cell: KRUCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch.nn.LSTMCell, GRUCell or RNNCell."""
        cell: Any = self.cell
        x = input if input.dim() == 2 else input.unsqueeze(0)
        count = 2 if cell.kind == "lstm" else 1
        if hx is None:
            state: State = (x.new_zeros(x.shape[0], cell.hidden_size),) * count
        else:
            state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
            state = state if input.dim() == 2 else tuple(s.unsqueeze(0) for s in state)
        step = make_step(cell.kind, _multiply(cell.weight_hh), cell.bias_hh, nonlinearity=cell.nonlinearity)
        new = step(_affine(cell.weight_ih, x, cell.bias_ih), state)
        new = new if input.dim() == 2 else tuple(s.squeeze(0) for s in new)
        return new if count == 2 else new[0]


def _multiply(weight: KroneckerMatrix | Tensor) -> Matrix:
    return partial(product, weight) if isinstance(weight, KroneckerMatrix) else lambda h: F.linear(h, weight)


def _affine(weight: KroneckerMatrix | Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = _multiply(weight)(x)
    return y if bias is None else y + bias


def product(weight: KroneckerMatrix, x: Tensor) -> Tensor:  # (n, cols) -> (n, gates * rows)
    """`KroneckerMatrix.forward` without tensors made on the way: those cannot be saved inside a loop."""
    sums: list[Tensor | None] = [None] * weight.gates

    def add(gate: int, y: Tensor) -> None:
        so_far = sums[gate]
        sums[gate] = y if so_far is None else so_far + y

    for term in weight.term_list():
        for gate, y in zip(term.gates, term(x).unbind(-2), strict=True):
            add(gate, y)
    if weight.diagonal is not None:
        n = min(weight.rows, weight.cols)
        parts = F.pad(x[..., None, :n] * weight.diagonal, (0, weight.rows - n))
        for gate, y in zip(weight.diagonal_gates, parts.unbind(-2), strict=True):
            add(gate, y)
    zero = x.new_zeros(*x.shape[:-1], weight.rows)
    flat = torch.cat([zero if y is None else y for y in sums], dim=-1)
    return flat if weight.overlay is None else flat + weight.overlay(x, weight.gates * weight.rows)


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
