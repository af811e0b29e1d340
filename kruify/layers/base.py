"""What KRURNN, KRULSTM and KRUGRU have in common: torch.nn.LSTM's interface around Kronecker matrices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from kruify.errors import UsageError
from kruify.factors import Structure, parse, stacks
from kruify.layers import kernel
from kruify.layers.backend import Weights
from kruify.layers.matrix import KroneckerMatrix, reset_like_torch
from kruify.layers.recurrent import RecurrentLayer, weight_suffix

Factors = str | Mapping[str, Sequence[Structure]] | None
Backend = Literal["auto", "reference", "dense", "kernel"]
GATES = {"rnn": ("h",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}  # in torch's order


def check_option(name: str, value: object, known: Sequence[str], owner: object) -> None:
    """Refuses a value that a constructor does not know.

    Raises:
        UsageError: it names those that it knows.
    """
    if value not in known:
        *most, last = (f"'{k}'" for k in known)
        choice = f"{', '.join(most)} or {last}" if most else last
        raise UsageError(f"{name} must be {choice}, got '{value}'", type(owner).__name__)


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
            f"expected {gates} structures of {rows}x{cols}, one per gate, or one of {gates * rows}x{cols}, got "
            + ", ".join(f"{s.rows}x{s.cols}" for s in structures),
            name,
        )
    matrix = KroneckerMatrix(structures, device, dtype)
    kernel.form_of(matrix)  # planned once, here: torch.compile could not trace it
    return matrix


class KRUBase(RecurrentLayer):
    """Constructor, forward signature and outputs of torch.nn.LSTM / GRU / RNN, with Kronecker recurrent matrices.

    Parameters carry torch's names. `weight_hh_l{k}{suffix}` is a `KroneckerMatrix`, so its entries in a state dict are
    `weight_hh_l0.terms.0.factors.1` and so on; `weight_ih_*` is dense unless `input_factors` is given.

    Args:
        factors: spec of the recurrent matrices (kruify.factors), or structures by weight name, one per gate or one of
            all gates stacked. Weights that a mapping does not name stay dense.
        input_factors: spec of the input matrices W_ih; None keeps them dense.
        backend: "auto" picks the fastest by a measured rule (kruify.layers.dispatch). "kernel" forces the compiled
            kernels, "dense" torch's own on the weight formed from the factors, "reference" a loop in plain torch.

    Raises:
        UsageError: a size, a spec or an option that the layer does not know.
    """

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
        *,
        nonlinearity: str = "tanh",
        factors: Factors = "auto",
        input_factors: str | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if input_size < 1 or hidden_size < 1 or num_layers < 1:
            raise UsageError("input_size, hidden_size and num_layers must be at least 1", owner)
        if proj_size and self.kind != "lstm":
            raise UsageError(f"proj_size belongs to an LSTM, got {proj_size}", owner)
        if not 0 <= proj_size < hidden_size:
            raise UsageError(f"proj_size must be below hidden_size, got {proj_size}", owner)
        if not 0 <= dropout <= 1:
            raise UsageError(f"dropout must be between 0 and 1, got {dropout}", owner)
        check_option("nonlinearity", nonlinearity, ("tanh", "relu") if self.kind == "rnn" else ("tanh",), self)
        check_option("backend", backend, get_args(Backend), self)
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.nonlinearity = bidirectional, proj_size, nonlinearity
        self.backend = backend
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

    @property
    def kernel_kind(self) -> str:
        return f"rnn_{self.nonlinearity}" if self.kind == "rnn" else self.kind

    @property
    def mode(self) -> str:
        """torch.nn's name of the kind: LSTM, GRU, RNN_TANH or RNN_RELU."""
        return self.kernel_kind.upper()

    def reset_parameters(self) -> None:
        """Dense weights and biases as torch does, uniform in +-1/sqrt(hidden); factors orthogonal."""
        reset_like_torch(self, self.hidden_size)

    def weights(self, layer: int, direction: int) -> Weights:
        suffix = weight_suffix(layer, direction)
        weights = {name: self._weight(name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        weights["weight_hr"] = self._weight("weight_hr" + suffix) if self.proj_size else None
        return weights

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
