"""What the layers and the operators compute, in plain differentiable torch: the sum of Kronecker products, one step of
each cell, and the loop over time. Slow and short on purpose.

It is the reference backend of the layers, the fallback of the operators, the oracle of the kernels, and the way to
whatever the kernels have no formula for: second derivatives, forward mode, batched derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kruify import kronecker
from kruify.ops.layout import decode

State = tuple[Tensor, ...]  # (h,) or (h, c), each (batch, size)
Step = Callable[[Tensor, State], tuple[State, Tensor]]  # (the input's share of the gates, state) -> state, workspace

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_modrelu": 1, "rnn_modrelu_complex": 1}
# Saved columns, in units of the hidden size.
WORKSPACE = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0, "rnn_modrelu": 1, "rnn_modrelu_complex": 1}
MODRELU = ("rnn_modrelu", "rnn_modrelu_complex")  # their bias is that of modReLU, (H,) or (H / 2,), not one of W h


def merge(factors: Sequence[Tensor], scale: Tensor | None, groups: Sequence[int]) -> list[Tensor]:
    """Multiplies consecutive factors (gates, rank, P_f, Q_f) into `len(groups)` stages; the first takes the scale."""
    stages, start = [], 0
    for size in groups:
        stage = factors[start]
        for factor in factors[start + 1 : start + size]:
            stage = kronecker.kron(stage, factor)
        stages.append(stage)
        start += size
    if scale is not None:
        stages[0] = stages[0] * scale[..., None, None]
    return stages


def kron_matmul(
    x: Tensor,  # (..., cols)
    stages: Sequence[Tensor],  # each (gates of its term, rank, P, Q)
    diagonal: Tensor | None,  # (diagonal gates, min(rows, cols))
    residual: Tensor | None,  # (blocks, block)
    residual_index: Tensor | None,  # (blocks, 2)
    bias: Tensor | None,  # (gates * rows,)
    layout: Sequence[int],
) -> Tensor:  # (..., gates * rows)
    """x @ W.T + bias, where W is the matrix that stages, diagonal and sparse residual stand for."""
    form, parts, start = decode(layout), [], 0
    for term in form.terms:
        # Under autocast the products are of a lower precision than x: they are added up in that of x.
        product = kronecker.matmul(x, stages[start : start + term.stages]).to(x.dtype)
        parts.append((term.gates, product))
        start += term.stages
    if diagonal is not None:
        n = diagonal.shape[-1]
        parts.append((form.diagonal_gates, F.pad(x[..., None, :n] * diagonal, (0, form.rows - n))))
    total = _sum_by_gate(parts, form.gates, -2)
    y = x.new_zeros(*x.shape[:-1], form.gates * form.rows) if total is None else total.flatten(-2)
    if residual is not None and residual_index is not None:
        row, column = residual_coordinates(residual_index, residual.shape[1])
        y = y.index_add(-1, row, x[..., column] * residual.reshape(-1))
    return y if bias is None else y + bias


def dense(
    stages: Sequence[Tensor],
    diagonal: Tensor | None,
    residual: Tensor | None,
    residual_index: Tensor | None,
    layout: Sequence[int],
) -> Tensor:  # (gates * rows, cols)
    """The dense W that stages, diagonal and sparse residual stand for."""
    form, parts, start = decode(layout), [], 0
    for term in form.terms:
        parts.append((term.gates, kronecker.to_dense(stages[start : start + term.stages])))
        start += term.stages
    if diagonal is not None:
        n = diagonal.shape[-1]
        parts.append((form.diagonal_gates, F.pad(torch.diag_embed(diagonal), (0, form.cols - n, 0, form.rows - n))))
    total, shape = _sum_by_gate(parts, form.gates, 0), (form.gates * form.rows, form.cols)
    if residual is None or residual_index is None:
        assert total is not None, "a matrix without parts"
        return total.reshape(shape)
    flat = residual.new_zeros(shape) if total is None else total.reshape(shape)
    row_and_column = residual_coordinates(residual_index, residual.shape[1])
    return flat.index_put(row_and_column, residual.reshape(-1).to(flat.dtype), accumulate=True)


def residual_coordinates(index: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a sparse residual, from the first row and the column of its blocks.

    Args:
        index: (blocks, 2), rows counted over all gates.
        block: rows of one block.

    Returns:
        rows and columns, each (blocks * block,) int64.
    """
    index = index.long()
    rows = index[:, :1] + torch.arange(block, device=index.device)
    return rows.reshape(-1), index[:, 1].repeat_interleave(block)


def _sum_by_gate(parts: Iterable[tuple[tuple[int, ...], Tensor]], gates: int, dim: int) -> Tensor | None:
    """Adds up tensors that hold some of the gates in dimension `dim`. No index tensors: torch.export's scan cannot save
    what is made within its loop."""
    total: Tensor | None = None
    for chosen, part in parts:
        if chosen != tuple(range(gates)):
            held = dict(zip(chosen, part.unbind(dim), strict=True))
            zero = torch.zeros_like(held[chosen[0]])
            part = torch.stack([held.get(gate, zero) for gate in range(gates)], dim)
        total = part if total is None else total + part
    return total


def cell(
    kind: str,  # a key of GATES
    x: Tensor,  # (batch, gates * H): W_ih x + b_ih
    product: Tensor,  # (batch, gates * H): W_hh h + b_hh
    state: State,
    bias: Tensor | None = None,  # modReLU's
) -> tuple[State, tuple[Tensor, ...]]:
    """One step of torch.nn's LSTM, GRU or RNN, or of the KRU as published: the new state, and what a backward pass
    needs beside it."""
    if kind == "lstm":
        i, f, g, o = (x + product).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * state[1] + i * g
        return (o * c.tanh(), c), (i, f, g, o, c)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), product.chunk(3, dim=-1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return (n + z * (state[0] - n),), (r, z, n, hn)
    total = x + product
    if kind in MODRELU:
        h = modrelu(state_of(total, kind), bias)
        return (planar(h) if kind == "rnn_modrelu_complex" else h,), (total,)
    return (total.relu() if kind == "rnn_relu" else total.tanh(),), ()


def over_time(
    step: Step,
    gates_x: Tensor,  # (S, gates * H), packed
    batch_sizes: Sequence[int],  # sequences still running at each step, descending
    state: State,
    reverse: bool = False,
) -> tuple[Tensor, State, Tensor]:  # outputs (S, size), final state, what the steps saved (S, columns)
    """The loop over time of one layer in one direction, on packed sequences sorted by descending length."""
    steps = len(batch_sizes)
    shares = torch.split(gates_x, list(batch_sizes))
    outputs, workspaces = [gates_x] * steps, [gates_x] * steps
    running, finished = tuple(s[: batch_sizes[-1]] for s in state) if reverse and steps else state, []
    for t in reversed(range(steps)) if reverse else range(steps):
        have, size = running[0].shape[0], batch_sizes[t]
        if size < have:  # shorter sequences ended at the step before
            finished.append(tuple(r[size:] for r in running))
            running = tuple(r[:size] for r in running)
        elif size > have:  # shorter sequences begin here
            running = tuple(torch.cat([r, s[have:size]]) for r, s in zip(running, state, strict=True))
        running, workspaces[t] = step(shares[t], running)
        outputs[t] = running[0]
    if finished:
        running = tuple(torch.cat(parts) for parts in zip(running, *reversed(finished), strict=True))
    if not steps:
        return state[0][:0], running, gates_x[:0]
    return torch.cat(outputs), running, torch.cat(workspaces)


def recurrence(
    x: Tensor,  # (S, input size), or (S, gates * H): the input's share of the gates, where w_ih is None
    w_ih: Tensor | None,  # (gates * H, input size)
    bias_ih: Tensor | None,  # (gates * H,)
    batch_sizes: Tensor,  # (T,) int64 on the CPU, descending, as in a PackedSequence
    h0: Tensor,  # (B, H)
    c0: Tensor | None,  # (B, H), LSTM only
    stages: Sequence[Tensor],
    diagonal: Tensor | None,
    residual: Tensor | None,
    residual_index: Tensor | None,
    bias: Tensor | None,  # (gates * H,), bias_hh; modReLU's own
    layout: Sequence[int],
    kind: str,  # a key of GATES
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # out (S, H), hT (B, H), cT (B, H), workspace (S, k * H)
    """One layer in one direction over a packed batch."""
    gates_x = x if w_ih is None else x @ w_ih.T
    gates_x = gates_x if bias_ih is None else gates_x + bias_ih
    inner, outer = (None, bias) if kind in MODRELU else (bias, None)

    def step(gates: Tensor, state: State) -> tuple[State, Tensor]:
        product = kron_matmul(state[0], stages, diagonal, residual, residual_index, inner, layout)
        state, saved = cell(kind, gates, product, state, outer)
        return state, torch.cat(saved, dim=1) if saved else gates[:, :0]

    state: State = (h0,) if c0 is None else (h0, c0)
    out, state, workspace = over_time(step, gates_x, batch_sizes.tolist(), state, reverse)
    if not len(batch_sizes):
        workspace = h0.new_empty(0, WORKSPACE[kind] * h0.shape[1])
    return out, state[0], None if c0 is None else state[1], workspace


def modrelu(z: Tensor, bias: Tensor | None) -> Tensor:
    """relu(|z| + b) z/|z| of real or complex z, 0 with derivative 0 where z is 0 (Arjovsky, Shah, Bengio 2016,
    equation 8)."""
    size = z.abs()
    return (size if bias is None else size + bias).relu() * z.sgn()


def state_of(planes: Tensor, kind: str) -> Tensor:
    """A complex state from its real parts followed by its imaginary parts: (..., H) -> (..., H / 2) complex."""
    if kind != "rnn_modrelu_complex":
        return planes
    real, imaginary = planes.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def planar(state: Tensor) -> Tensor:
    """The way back: the real parts of a complex state followed by its imaginary ones; a real one as it is."""
    return torch.cat([state.real, state.imag], dim=-1) if state.is_complex() else state
