"""What KRURNN, KRULSTM and KRUGRU have in common: torch.nn.LSTM's interface around Kronecker matrices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kruify.errors import UsageError
from kruify.factors import Structure, parse, stacks
from kruify.layers import dense, dispatch, kernel, reference
from kruify.layers.matrix import KroneckerMatrix, reset_like_torch
from kruify.layers.steps import GATES, State, make_step
from kruify.ops.precision import autocast_to

Factors = str | Mapping[str, Sequence[Structure]] | None
Backend = Literal["auto", "reference", "dense", "kernel"]


def build_weight(
    name: str,
    gates: int,
    rows: int,
    cols: int,
    factors: Factors,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> KroneckerMatrix | nn.Parameter:
    """A (gates * rows, cols) weight: Kronecker where `factors` speaks of it (by spec or by name), else dense."""
    structures: Sequence[Structure] | None
    if isinstance(factors, str):
        if gates > 1 and stacks(factors):
            structures = [parse(factors).resolve(gates * rows, cols, gates)]
        else:
            structures = [parse(factors).resolve(rows, cols)] * gates
    else:
        structures = None if factors is None else factors.get(name)
    if structures is None:
        return nn.Parameter(torch.empty(gates * rows, cols, device=device, dtype=dtype))
    if sum(s.gates for s in structures) != gates or any((s.rows, s.cols) != (s.gates * rows, cols) for s in structures):
        raise UsageError(
            f"expected {gates} structures of {rows}x{cols}, one a gate, or one of {gates * rows}x{cols}, got "
            + ", ".join(f"{s.rows}x{s.cols}" for s in structures),
            name,
        )
    matrix = KroneckerMatrix(structures, device, dtype)
    kernel.form_of(matrix)  # planned once, here: torch.compile could not trace it
    return matrix


def apply_weight(weight: KroneckerMatrix | Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x @ W.T + b with a dense or a Kronecker weight: (n, cols) -> (n, rows)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y: Tensor = weight(x)
    return y if bias is None else y + bias


class KRUBase(nn.Module):
    """Constructor, forward signature and outputs of torch.nn.LSTM / GRU / RNN, with Kronecker recurrent matrices.

    Parameters carry torch's names. `weight_hh_l{k}{suffix}` is a `KroneckerMatrix`, so its entries in a state dict are
    `weight_hh_l0.terms.0.factors.1` and so on; `weight_ih_*` is dense unless `input_factors` is given.

    Args:
        factors: spec of the recurrent matrices (kruify.factors), or structures by weight name, one a gate or one of all
            gates stacked. Weights that a mapping does not name stay dense.
        input_factors: spec of the input matrices W_ih; None keeps them dense.
        backend: "auto" picks the fastest by a measured rule (kruify.layers.dispatch); "reference", "dense" and
            "kernel" force one path.
    """

    kind: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        nonlinearity: str = "tanh",
        *,
        factors: Factors = "auto",
        input_factors: str | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1 or num_layers < 1:
            raise UsageError("input_size, hidden_size and num_layers must be at least 1", type(self).__name__)
        if not 0 <= proj_size < hidden_size:
            raise UsageError(f"proj_size must be below hidden_size, got {proj_size}", type(self).__name__)
        if not 0 <= dropout <= 1:
            raise UsageError(f"dropout must be between 0 and 1, got {dropout}", type(self).__name__)
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.nonlinearity = bidirectional, proj_size, nonlinearity
        self.backend: Backend = backend
        self._build(factors, input_factors, device, dtype)
        self.reset_parameters()

    def _build(
        self,
        factors: Factors,
        input_factors: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        gates, hidden = len(GATES[self.kind]), self.hidden_size
        ih_factors = input_factors if isinstance(factors, str) or input_factors else factors
        for layer, direction in self.directions():
            suffix = weight_suffix(layer, direction)
            features = self.input_size if layer == 0 else self.output_size * self.num_directions
            for name, columns, spec in (
                (f"weight_ih{suffix}", features, ih_factors),
                (f"weight_hh{suffix}", self.output_size, factors),
            ):
                setattr(self, name, build_weight(name, gates, hidden, columns, spec, device, dtype))
            if self.bias:
                for name in (f"bias_ih{suffix}", f"bias_hh{suffix}"):
                    setattr(self, name, nn.Parameter(torch.empty(gates * hidden, device=device, dtype=dtype)))
            if self.proj_size:
                w_hr = torch.empty(self.proj_size, hidden, device=device, dtype=dtype)
                setattr(self, f"weight_hr{suffix}", nn.Parameter(w_hr))

    def directions(self) -> list[tuple[int, int]]:
        """(layer, direction) pairs in torch's order."""
        return [(k, d) for k in range(self.num_layers) for d in range(self.num_directions)]

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of h: the projection's where there is one."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.output_size, self.hidden_size) if self.kind == "lstm" else (self.output_size,)

    def reset_parameters(self) -> None:
        """Dense weights and biases as torch does, uniform in +-1/sqrt(hidden); factors orthogonal."""
        reset_like_torch(self, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Does nothing; torch.nn.LSTM has it, so callers may call it."""

    def recurrent_weights(self) -> list[KroneckerMatrix | Tensor]:
        """weight_hh of every layer and direction."""
        return [self._weight(f"weight_hh{weight_suffix(k, d)}") for k, d in self.directions()]  # type: ignore[misc]

    def weights(self, layer: int, direction: int) -> dict[str, KroneckerMatrix | Tensor | None]:
        """The weights of one layer and direction under the names weight_ih, weight_hh, bias_ih, bias_hh, weight_hr."""
        suffix = weight_suffix(layer, direction)
        weights = {name: self._weight(name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        weights["weight_hr"] = self._weight("weight_hr" + suffix) if self.proj_size else None
        return weights

    def _weight(self, name: str) -> KroneckerMatrix | Tensor | None:
        """The attribute, without the detours of nn.Module.__getattr__ where it is a plain parameter or matrix."""
        found: Any = self._parameters.get(name)
        if found is None:
            found = self._modules.get(name)
        return getattr(self, name, None) if found is None else found

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

        Under torch.autocast outputs and states have its dtype, as those of torch.nn.LSTM; within, states and sums are
        float32. How exact the products are: kruify.ops.precision.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise UsageError(f"expected 2 or 3 dimensions of input, got {input.dim()}", type(self).__name__)
        unbatched = input.dim() == 2
        x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if self.batch_first else input
        self._check_features(x)
        state = self._initial_state(hx, x, x.shape[1], unbatched)
        output, state = self._run_padded(x, state)
        if torch.is_autocast_enabled(x.device.type):
            output, state = autocast_to(output), tuple(map(autocast_to, state))
        if unbatched:
            output, state = output.squeeze(1), tuple(s.squeeze(1) for s in state)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, self._pack_state(state)

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_features(data)
        state = self._initial_state(hx, data, int(batch_sizes[0]), False)
        if hx is not None and sorted_indices is not None:
            state = tuple(s.index_select(1, sorted_indices) for s in state)
        steps = batch_sizes.tolist()
        path = self._pick(len(steps), steps[0], data)
        if path == "dense":
            output, state = dense.run_packed(self, data, batch_sizes, state)
        elif path == "kernel":
            output, state = self._run_layers(data, batch_sizes, state)
        else:
            output, state = self._run_layers(data, steps, state)
        output, state = autocast_to(output), tuple(map(autocast_to, state))
        if unsorted_indices is not None:
            state = tuple(s.index_select(1, unsorted_indices) for s in state)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), self._pack_state(state)

    def _run_padded(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        steps, batch = x.shape[:2]
        if steps == 0 or batch == 0:
            empty = x.new_zeros(steps, batch, self.output_size * self.num_directions)
            return empty, tuple(s.clone() for s in state)
        path = self._pick(steps, batch, x)
        if path == "dense":
            if dense.in_one_node(self, x):
                return self._run_layers(x, None, state)
            return dense.run_padded(self, x, state)
        batch_sizes = torch.full((steps,), batch, device="cpu") if path == "kernel" else [batch] * steps
        output, state = self._run_layers(x.reshape(steps * batch, -1), batch_sizes, state)
        return output.reshape(steps, batch, -1), state

    @property
    def kernel_kind(self) -> str:
        """The kind as the operators name it."""
        return f"rnn_{self.nonlinearity}" if self.kind == "rnn" else self.kind

    def _pick(self, steps: int, batch: int, x: Tensor) -> str:
        if self.backend == "auto":
            return dispatch.pick(self, steps, batch, x)
        if self.backend == "kernel" and not dispatch.kernel_serves(self, x):
            raise UsageError(
                "the compiled kernels need Kronecker recurrent matrices, no projection, and float32 or float64 on a"
                f" device they were built for, got {x.dtype} on {x.device.type}",
                type(self).__name__,
                "backend='auto' picks a path that works",
            )
        return self.backend

    def _run_layers(
        self,
        data: Tensor,  # (sum of batch_sizes, features), packed; (time, batch, features) without batch_sizes
        batch_sizes: list[int] | Tensor | None,  # a tensor asks for the compiled kernels, None for torch's
        state: State,  # each (layers * directions, batch, size)
    ) -> tuple[Tensor, State]:
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                data = F.dropout(data, self.dropout, self.training)
            outputs = []
            for direction in range(self.num_directions):
                index = layer * self.num_directions + direction
                output, final = self._run_direction(data, batch_sizes, tuple(s[index] for s in state), layer, direction)
                outputs.append(output)
                finals.append(final)
            data = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if len(finals) == 1:
            return data, tuple(s.unsqueeze(0) for s in finals[0])
        return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _run_direction(
        self, data: Tensor, batch_sizes: list[int] | Tensor | None, state: State, layer: int, direction: int
    ) -> tuple[Tensor, State]:
        w = self.weights(layer, direction)
        if batch_sizes is None:
            return dense.run_direction(w, data, state, reverse=direction == 1)
        if isinstance(batch_sizes, Tensor):
            return kernel.run_direction(w, self.kernel_kind, data, batch_sizes, state, reverse=direction == 1)
        weight_hh = w["weight_hh"]
        gates_x = apply_weight(w["weight_ih"], data, w["bias_ih"])  # type: ignore[arg-type]
        matrix = weight_hh if isinstance(weight_hh, KroneckerMatrix) else lambda h: F.linear(h, weight_hh)  # type: ignore[arg-type]
        step = make_step(self.kind, matrix, w["bias_hh"], w["weight_hr"], self.nonlinearity)  # type: ignore[arg-type]
        return reference.run(step, gates_x, batch_sizes, state, reverse=direction == 1)

    def _check_features(self, x: Tensor) -> None:
        if x.shape[-1] != self.input_size:
            raise UsageError(f"expected {self.input_size} input features, got {x.shape[-1]}", type(self).__name__)

    def _initial_state(
        self, hx: Tensor | tuple[Tensor, Tensor] | None, x: Tensor, batch: int, unbatched: bool
    ) -> State:
        rows = self.num_layers * self.num_directions
        if hx is None:
            sizes = self.state_sizes
            if len(set(sizes)) == 1:
                return (x.new_zeros(rows, batch, sizes[0]),) * len(sizes)
            return tuple(x.new_zeros(rows, batch, size) for size in sizes)
        given: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(self.state_sizes):
            wanted = "the pair (h_0, c_0)" if self.kind == "lstm" else "h_0 alone"
            raise UsageError(f"the initial state must be {wanted}", type(self).__name__)
        if unbatched:
            given = tuple(s.unsqueeze(1) if s.dim() == 2 else s for s in given)
        for s, size in zip(given, self.state_sizes, strict=True):
            if s.shape != (rows, batch, size):
                raise UsageError(
                    f"expected an initial state of shape {(rows, batch, size)}, got {tuple(s.shape)}",
                    type(self).__name__,
                )
        return given

    def _pack_state(self, state: State) -> Tensor | tuple[Tensor, Tensor]:
        return (state[0], state[1]) if self.kind == "lstm" else state[0]

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
            ("proj_size", 0),
            ("nonlinearity", "tanh"),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def weight_suffix(layer: int, direction: int) -> str:
    """The end of torch's weight names: `_l0`, `_l0_reverse`."""
    return f"_l{layer}" + ("_reverse" if direction else "")
