"""The Kronecker Recurrent Unit as published: complex state, complex factors, modReLU.

C. Jose, M. Cisse, F. Fleuret, "Kronecker Recurrent Units", ICML 2018 (arXiv 1705.10142):

    h_t = modReLU_b(W h_{t-1} + U x_t),      W = W_0 (x) W_1 (x) ... (x) W_{F-1}

with complex factors W_f and a complex U. The real orthogonal group is disconnected (det +1 or -1), the unitary group is
not: that is why the factors are complex. `complex_state=False` gives the real unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from kruify.errors import UsageError
from kruify.factors import parse
from kruify.layers import kernel, planar
from kruify.layers.backend import Weights
from kruify.layers.base import check_option
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.recurrent import RecurrentLayer
from kruify.ops.reference import State

NONLINEARITIES = ("modrelu", "tanh", "relu")
STARTS = ("linear", "small")
SMALL_THRESHOLD = 0.01


class KRU(RecurrentLayer):
    """A recurrent layer with nn.RNN's interface whose recurrent matrix is one product of small unitary factors.

    With a complex state the output is real, the real parts followed by the imaginary parts: (..., 2 * hidden_size). A
    `torch.nn.Linear` on it is the paper's real output map.

    Args:
        factors: spec of the recurrent matrix (kruify.factors), "2x2" for the smallest, 8 log2(N) real numbers.
        complex_state: complex factors, input map and state; False for the real unit.
        nonlinearity: "modrelu"; for a real state also "tanh" and "relu".
        start: of W_ih and the biases. "linear": W_ih with variance 1/inputs, biases zero, so that modReLU does nothing
            yet and the layer is a linear isometry of its state. "small" is that of Arjovsky, Shah & Bengio, "Unitary
            Evolution Recurrent Neural Networks" (ICML 2016): W_ih, real and imaginary parts alike, uniform as Glorot &
            Bengio have it, biases uniform in +-0.01. With few inputs states are several times smaller then, so that
            modReLU's thresholds, which a step of Adam moves by the learning rate, soon are as large: what is no linear
            function of the inputs (adding) needs that.
        backend: "auto" takes the compiled kernels where they serve, else a loop over time; "kernel" and "reference"
            force one of them.

    Parameters of layer k: `weight_ih_l{k}` (hidden, inputs) and `weight_hh_l{k}` (a `KroneckerMatrix`), complex for
    a complex state; `bias_l{k}` (hidden,), real.
    """

    kind = "rnn"
    torch_has_it = False
    weight_ih_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        factors: str = "2x2",
        complex_state: bool = True,
        nonlinearity: str = "modrelu",
        start: str = "linear",
        backend: Literal["auto", "kernel", "reference"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1 or num_layers < 1:
            raise UsageError("input_size, hidden_size and num_layers must be at least 1", "KRU")
        check_option("nonlinearity", nonlinearity, NONLINEARITIES[:1] if complex_state else NONLINEARITIES, self)
        check_option("start", start, STARTS, self)
        check_option("backend", backend, ("auto", "kernel", "reference"), self)
        dtype = dtype or torch.get_default_dtype()
        if complex_state and dtype not in kernel.COMPLEX:
            raise UsageError(f"a complex state needs float32 or float64, got {dtype}", "KRU")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.complex_state, self.nonlinearity, self.backend = complex_state, nonlinearity, backend
        self.start = start
        state_dtype = kernel.COMPLEX[dtype] if complex_state else dtype
        structure = parse(factors).resolve(hidden_size, hidden_size)
        for k in range(num_layers):
            inputs = input_size if k == 0 else self.output_size
            w_ih = torch.empty(hidden_size, inputs, device=device, dtype=state_dtype)
            setattr(self, f"weight_ih_l{k}", nn.Parameter(w_ih))
            matrix = KroneckerMatrix([structure], device, state_dtype)
            setattr(self, f"weight_hh_l{k}", matrix)
            (planar if complex_state else kernel).form_of(matrix)  # planned here: torch.compile could not trace it
            b = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"bias_l{k}", b)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KRU:
        """`double`, `to`, `cuda` and the like: complex numbers follow what happens to real ones.

        Raises:
            UsageError: to a dtype that no complex state has, such as half.
        """
        if not self.complex_state:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        if fn(torch.empty(0, dtype=torch.float32)).dtype not in kernel.COMPLEX:
            raise UsageError("a complex state needs float32 or float64", "KRU", "Use .float() or .double()")

        def of_parts(t: Tensor) -> Tensor:
            return torch.view_as_complex(fn(torch.view_as_real(t))) if t.is_complex() else fn(t)

        return super()._apply(of_parts, recurse)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the state, the input map and the factors."""
        return self.weight_ih_l0.dtype

    @property
    def output_size(self) -> int:
        """Features of the output: real and imaginary parts of a complex state."""
        return self.hidden_size * (2 if self.complex_state else 1)

    @property
    def kernel_kind(self) -> str:
        return f"rnn_{self.nonlinearity}" + ("_complex" if self.complex_state else "")

    def weights(self, layer: int, direction: int) -> Weights:
        own = {"weight_ih": f"weight_ih_l{layer}", "weight_hh": f"weight_hh_l{layer}", "bias_hh": f"bias_l{layer}"}
        found = {name: self._weight(of_layer) for name, of_layer in own.items()}
        return {**found, "bias_ih": None, "weight_hr": None}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Factors Haar distributed over the unitary group; W_ih and biases as `start` says."""
        for k in range(self.num_layers):
            w_ih: Tensor = getattr(self, f"weight_ih_l{k}")
            small = self.start == "small"
            if small:
                bound = (6 / sum(w_ih.shape)) ** 0.5
                (torch.view_as_real(w_ih) if self.complex_state else w_ih).uniform_(-bound, bound)
            else:
                w_ih.normal_(std=w_ih.shape[1] ** -0.5)
            matrix: KroneckerMatrix = getattr(self, f"weight_hh_l{k}")
            for term in matrix.term_list():
                term.reset_parameters()
            if self.bias:
                bias: Tensor = getattr(self, f"bias_l{k}")
                bias.uniform_(-SMALL_THRESHOLD, SMALL_THRESHOLD) if small else bias.zero_()

    def zero_state(self, x: Tensor, rows: int, batch: int) -> State:
        return (torch.zeros(rows, batch, self.hidden_size, dtype=self.state_dtype, device=x.device),)

    def initial_state(self, hx: Tensor | tuple[Tensor, Tensor] | None, x: Tensor, batch: int, unbatched: bool) -> State:
        if isinstance(hx, Tensor) and hx.is_complex() != self.complex_state:
            raise UsageError(f"expected an initial state of {self.state_dtype}, got {hx.dtype}", "KRU")
        return super().initial_state(hx, x, batch, unbatched)

    def extra_repr(self) -> str:
        kind = "complex" if self.complex_state else "real"
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, {kind}, {self.nonlinearity}"
