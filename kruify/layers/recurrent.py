"""What every recurrent layer here has in common with torch.nn's: forms of input, initial state, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kruify.errors import UsageError
from kruify.layers import dispatch
from kruify.layers.backend import Backend, Sequences, Weights
from kruify.layers.matrix import KroneckerMatrix
from kruify.ops.precision import autocast_to
from kruify.ops.reference import State


class RecurrentLayer(nn.Module):
    """Inputs are arranged as packed sequences, whatever their form, and one backend runs them.

    A subclass says with `weights` where its weights are, and in which kernel's kind it is one.
    """

    kind: str
    torch_has_it = True  # whether torch has a kernel of its own for the dense layer
    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bias: bool
    dropout: float
    backend: str
    proj_size = 0

    @property
    def num_directions(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        """Features of the output of one direction."""
        return self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Of h, or of h and c."""
        return (self.hidden_size,)

    @property
    def kernel_kind(self) -> str:
        """The kind as the operators name it: a key of kruify.ops.reference.GATES."""
        raise NotImplementedError

    def weights(self, layer: int, direction: int) -> Weights:
        """The weights of one layer and direction under the names weight_ih, weight_hh, bias_ih, bias_hh, weight_hr."""
        raise NotImplementedError

    def directions(self) -> list[tuple[int, int]]:
        """(layer, direction) pairs in torch's order."""
        return [(k, d) for k in range(self.num_layers) for d in range(self.num_directions)]

    def weights_of_directions(self) -> list[Weights]:
        """`weights` of every layer and direction."""
        return [self.weights(k, d) for k, d in self.directions()]

    def recurrent_weights(self) -> list[KroneckerMatrix | Tensor]:
        """weight_hh of every layer and direction."""
        return [self._weight(f"weight_hh{weight_suffix(k, d)}") for k, d in self.directions()]  # type: ignore[misc]

    def _weight(self, name: str) -> KroneckerMatrix | Tensor | None:
        """The attribute, without the detours of nn.Module.__getattr__ where it is a plain parameter or matrix."""
        found: Any = self._parameters.get(name)
        if found is None:
            found = self._modules.get(name)
        return getattr(self, name, None) if found is None else found

    @property
    def all_weights(self) -> list[list[KroneckerMatrix | Tensor]]:
        """The weights of each layer and direction, in torch's order."""
        return [[w for w in weights.values() if w is not None] for weights in self.weights_of_directions()]

    @property
    def _flat_weights(self) -> None:  # torch.nn.LSTM computes with what is put there: that must not be lost silently
        raise AttributeError

    def flatten_parameters(self) -> None:
        """Does nothing; torch.nn.LSTM has it, so callers may call it."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """As torch.nn.LSTM / GRU / RNN.

        Args:
            input: (time, batch, features), (batch, time, features) with batch_first, (time, features) unbatched, or a
                PackedSequence.
            hx: initial h of shape (layers * directions, batch, size), for an LSTM the pair (h, c); zeros if None.

        Returns:
            output sequence in the form of the input, and the final state in the form of hx.

        Raises:
            UsageError: a shape does not fit the layer.

        Under torch.autocast outputs and states have its dtype, as those of torch.nn.LSTM, but for complex states;
        within, states and sums are float32. How exact the products are: kruify.ops.precision.
        """
        return self.compute(input, hx, dispatch.choose)

    def compute(
        self, input: Any, hx: Any, choose: Callable[[RecurrentLayer, Sequences, State], Backend]
    ) -> tuple[Any, Any]:
        """`forward` with another choice of backend."""
        order = back = None
        unbatched = False
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            sequences = Sequences(data, len(sizes), int(sizes[0]), sizes)
        elif not isinstance(input, Tensor):
            raise UsageError(*not_a_tensor(input, "a tensor or a PackedSequence", self))
        elif input.dim() not in (2, 3):
            raise UsageError(f"expected 2 or 3 dimensions of input, got {input.dim()}", type(self).__name__)
        else:
            unbatched = input.dim() == 2
            x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if self.batch_first else input
            sequences = Sequences(x, *x.shape[:2])
        state = self.initial_state(hx, sequences.data, sequences.batch, unbatched)
        if hx is not None and order is not None:
            state = tuple(s.index_select(1, order) for s in state)
        output, state = choose(self, sequences, state).run(self, sequences, state)
        if not output.is_meta and torch.is_autocast_enabled(output.device.type):
            output, state = autocast_to(output), tuple(map(autocast_to, state))
        if back is not None:
            state = tuple(s.index_select(1, back) for s in state)
        if unbatched:
            state = tuple(s.squeeze(1) for s in state)
        final = (state[0], state[1]) if len(state) == 2 else state[0]
        if isinstance(input, PackedSequence):
            return PackedSequence(output.flatten(0, -2), input.batch_sizes, order, back), final
        if output.dim() == 2:
            output = output.view(sequences.steps, sequences.batch, output.shape[-1])
        return output.squeeze(1) if unbatched else output.transpose(0, 1) if self.batch_first else output, final

    def initial_state(self, hx: Tensor | tuple[Tensor, Tensor] | None, x: Tensor, batch: int, unbatched: bool) -> State:
        """The state that an input x (..., features) starts from, each part (layers * directions, batch, size).

        Raises:
            UsageError: x or hx do not fit the layer.
        """
        if x.shape[-1] != self.input_size:
            raise UsageError(f"expected {self.input_size} input features, got {x.shape[-1]}", type(self).__name__)
        check_device(self, self._weight("weight_ih_l0"), x)
        rows = self.num_layers * self.num_directions
        if hx is None:
            return self.zero_state(x, rows, batch)
        sizes = self.state_sizes
        given: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(sizes):
            wanted = "the pair (h_0, c_0)" if len(sizes) == 2 else "h_0 alone"
            raise UsageError(f"the initial state must be {wanted}", type(self).__name__)
        if unbatched:
            given = tuple(s.unsqueeze(1) if s.dim() == 2 else s for s in given)
        for s, size in zip(given, sizes, strict=True):
            if s.shape != (rows, batch, size):
                raise UsageError(
                    f"expected an initial state of shape {(rows, batch, size)}, got {tuple(s.shape)}",
                    type(self).__name__,
                )
            check_device(self, s, x, "initial state")
        return given

    def zero_state(self, x: Tensor, rows: int, batch: int) -> State:
        """Zeros of the dtype that the state has for input x."""
        sizes = self.state_sizes
        if len(set(sizes)) == 1:
            return (x.new_zeros(rows, batch, sizes[0]),) * len(sizes)
        return tuple(x.new_zeros(rows, batch, size) for size in sizes)


def not_a_tensor(given: object, wanted: str, module: nn.Module) -> tuple[str, str, str | None]:
    """What a `UsageError` says of an input that is no tensor."""
    of_fx = isinstance(given, torch.fx.Proxy)
    hint = "Make this class a leaf: is_leaf_module of torch.fx.Tracer; or use torch.export" if of_fx else None
    return f"expected {wanted}, got a {type(given).__name__}", type(module).__name__, hint


def check_device(module: nn.Module, own: Any, x: Tensor, what: str = "weights") -> None:
    """Refuses an input x on another device than `own`, the layer's weights or the initial state.

    Raises:
        UsageError: it names both devices.
    """
    if own.device != x.device:
        empty = own.device.type == "meta" and what == "weights"
        hint = "They have no numbers yet: load a state dict with assign=True" if empty else "Move one with .to()"
        raise UsageError(f"the {what} on {own.device}, the input on {x.device}", type(module).__name__, hint)


def weight_suffix(layer: int, direction: int) -> str:
    """The end of torch's weight names: `_l0`, `_l0_reverse`."""
    return f"_l{layer}" + ("_reverse" if direction else "")
