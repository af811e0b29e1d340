"""The Kronecker Recurrent Unit as published: complex state, complex factors, modReLU.

C. Jose, M. Cisse, F. Fleuret, "Kronecker Recurrent Units", ICML 2018 (arXiv 1705.10142):

    h_t = modReLU_b(W h_{t-1} + U x_t),      W = W_0 (x) W_1 (x) ... (x) W_{F-1}

with complex factors W_f and a complex U. The real orthogonal group is disconnected (det +1 or -1), the unitary group is
not: that is why the factors are complex. `complex_state=False` gives the real unit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kruify.errors import UsageError
from kruify.factors import parse
from kruify.layers import kernel, planar, reference
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.steps import State, Step
from kruify.ops.precision import autocast_to
from kruify.ops.reference import modrelu
from kruify.ops.reference import planar as planar_form

NONLINEARITIES = ("modrelu", "tanh", "relu")
STARTS = ("linear", "small")
SMALL_THRESHOLD = 0.01


class KRU(nn.Module):
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
        if nonlinearity not in NONLINEARITIES or (complex_state and nonlinearity != "modrelu"):
            allowed = "'modrelu'" if complex_state else "'modrelu', 'tanh' or 'relu'"
            raise UsageError(f"nonlinearity must be {allowed}, got '{nonlinearity}'", "KRU")
        if start not in STARTS:
            raise UsageError(f"start must be 'linear' or 'small', got '{start}'", "KRU")
        if backend not in ("auto", "kernel", "reference"):
            raise UsageError(f"backend must be 'auto', 'kernel' or 'reference', got '{backend}'", "KRU")
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
            if not complex_state:
                kernel.form_of(matrix)  # planned once, here: torch.compile could not trace it
            b = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"bias_l{k}", b)
        self._forms = {name: planar.form(matrix, name == "cuda") for name in ("cpu", "cuda")} if complex_state else {}
        self.reset_parameters()

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the state, the input map and the factors."""
        return self.weight_ih_l0.dtype

    @property
    def output_size(self) -> int:
        """Features of the output: real and imaginary parts of a complex state."""
        return self.hidden_size * (2 if self.complex_state else 1)

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

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """As torch.nn.RNN; hx and the final state have the dtype of the state: (layers, batch, hidden).

        Args:
            input: real, (time, batch, features), (batch, time, features) with batch_first, (time, features)
                unbatched, or a PackedSequence.
            hx: initial state, zeros if None.

        Raises:
            UsageError: a shape does not fit the layer.

        Under torch.autocast outputs and real states have its dtype; complex states keep theirs.
        """
        if isinstance(input, PackedSequence):
            order, back = input.sorted_indices, input.unsorted_indices
            sizes = input.batch_sizes if self._is_compiled(input.data) else input.batch_sizes.tolist()
            h0 = self._initial_state(hx, input.data, int(sizes[0]))
            output, final = self._run(input.data, sizes, h0 if order is None else h0.index_select(1, order))
            final = final if back is None else final.index_select(1, back)
            return PackedSequence(output, input.batch_sizes, order, back), final
        if input.dim() not in (2, 3):
            raise UsageError(f"expected 2 or 3 dimensions of input, got {input.dim()}", "KRU")
        unbatched = input.dim() == 2
        x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if self.batch_first else input
        steps, batch = x.shape[:2]
        h0 = self._initial_state(hx.unsqueeze(1) if unbatched and hx is not None else hx, x, batch)
        batch_sizes = torch.full((steps,), batch, device="cpu") if self._is_compiled(x) else [batch] * steps
        output, final = self._run(x.reshape(steps * batch, x.shape[2]), batch_sizes, h0)
        output = output.reshape(steps, batch, self.output_size)
        if unbatched:
            return output.squeeze(1), final.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, final

    def _is_compiled(self, x: Tensor) -> bool:
        """Whether the compiled kernels run this input."""
        if self.backend == "reference" or x.numel() == 0:
            return False
        serves = all(kernel.serves(getattr(self, f"weight_hh_l{k}"), x, False) for k in range(self.num_layers))
        if self.backend == "kernel" and not serves:
            raise UsageError(
                "the compiled kernels need float32 or float64 parameters and input on a device they were built for, got"
                f" input of {x.dtype} on {x.device.type}",
                "KRU",
                "backend='auto' picks a path that works",
            )
        return serves

    def _run(self, data: Tensor, batch_sizes: list[int] | Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        finals = []
        for k in range(self.num_layers):
            if k and self.dropout:
                data = F.dropout(data, self.dropout, self.training)
            if isinstance(batch_sizes, Tensor):
                data, final = self._run_compiled(k, data, batch_sizes, h0[k])
            else:
                data, final = self._run_reference(k, data, batch_sizes, h0[k])
            finals.append(final)
        return autocast_to(data), autocast_to(torch.stack(finals))

    def _weights(self, k: int) -> tuple[Tensor, KroneckerMatrix, Tensor | None]:
        return getattr(self, f"weight_ih_l{k}"), getattr(self, f"weight_hh_l{k}"), getattr(self, f"bias_l{k}")

    def _run_compiled(self, k: int, data: Tensor, batch_sizes: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, matrix, bias = self._weights(k)
        if self.complex_state:
            form = self._forms["cuda" if data.is_cuda else "cpu"]
            return planar.run(form, matrix, w_ih, bias, data, batch_sizes, h0)
        weights: kernel.Weights = {"weight_ih": w_ih, "weight_hh": matrix, "bias_ih": None, "bias_hh": bias}
        kind = f"rnn_{self.nonlinearity}"
        output, (final,) = kernel.run_direction(weights, kind, data, batch_sizes, (h0,), reverse=False)
        return output, final

    def _run_reference(self, k: int, data: Tensor, batch_sizes: list[int], h0: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, matrix, bias = self._weights(k)
        h, (final,) = reference.run(self._step(matrix, bias), self._project(data, w_ih), batch_sizes, (h0,))
        return planar_form(h), final

    def _project(self, data: Tensor, w_ih: Tensor) -> Tensor:
        """U x for real x: two real products instead of a complex one."""
        if not self.complex_state:
            return F.linear(data, w_ih)
        parts = (F.linear(data, part).to(part.dtype) for part in (w_ih.real, w_ih.imag))  # autocast lowers a product
        return torch.complex(*parts)

    def _step(self, matrix: KroneckerMatrix, bias: Tensor | None) -> Step:
        def step(gates_x: Tensor, state: State) -> State:
            total = matrix(state[0]) + gates_x
            if self.nonlinearity == "modrelu":
                return (modrelu(total, bias),)
            total = total if bias is None else total + bias
            return (torch.tanh(total) if self.nonlinearity == "tanh" else torch.relu(total),)

        return step

    def _initial_state(self, hx: Tensor | None, x: Tensor, batch: int) -> Tensor:
        if x.shape[-1] != self.input_size:
            raise UsageError(f"expected {self.input_size} input features, got {x.shape[-1]}", "KRU")
        shape = (self.num_layers, batch, self.hidden_size)
        if hx is None:
            return torch.zeros(shape, dtype=self.state_dtype, device=x.device)
        if hx.is_complex() != self.complex_state:
            raise UsageError(f"expected an initial state of {self.state_dtype}, got {hx.dtype}", "KRU")
        if tuple(hx.shape) != shape:
            raise UsageError(f"expected an initial state of shape {shape}, got {tuple(hx.shape)}", "KRU")
        return hx

    def extra_repr(self) -> str:
        kind = "complex" if self.complex_state else "real"
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, {kind}, {self.nonlinearity}"
