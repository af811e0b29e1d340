"""What the operators compute, in plain differentiable torch: oracle of the kernels, their fallback, and the way to
second derivatives. Slow and short on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kruify import kronecker
from kruify.ops.layout import decode

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
    overlay: Tensor | None,  # (blocks, block)
    overlay_index: Tensor | None,  # (blocks, 2)
    bias: Tensor | None,  # (gates * rows,)
    layout: Sequence[int],
) -> Tensor:  # (..., gates * rows)
    """x @ W.T + bias, where W is the matrix that stages, diagonal and overlay stand for."""
    form = decode(layout)
    y = x.new_zeros(*x.shape[:-1], form.gates, form.rows)
    start = 0
    for term in form.terms:
        part = kronecker.matmul(x, list(stages[start : start + term.stages]))
        y = y.index_add(-2, _index(term.gates, x), part)
        start += term.stages
    if diagonal is not None:
        n = diagonal.shape[-1]
        part = functional.pad(x[..., None, :n] * diagonal, (0, form.rows - n))
        y = y.index_add(-2, _index(form.diagonal_gates, x), part)
    y = y.flatten(-2)
    if overlay is not None and overlay_index is not None:
        index, block = overlay_index.long(), overlay.shape[1]
        row = (index[:, :1] + torch.arange(block, device=x.device)).reshape(-1)
        column = index[:, 1].repeat_interleave(block)
        y = y.index_add(-1, row, x[..., column] * overlay.reshape(-1))
    return y if bias is None else y + bias


def recurrence(
    x: Tensor,  # (S, input size), or (S, gates * H): the input's share of the gates, where w_ih is None
    w_ih: Tensor | None,  # (gates * H, input size)
    bias_ih: Tensor | None,  # (gates * H,)
    batch_sizes: Tensor,  # (T,) int64 on the CPU, descending, as in a PackedSequence
    h0: Tensor,  # (B, H)
    c0: Tensor | None,  # (B, H), LSTM only
    stages: Sequence[Tensor],
    diagonal: Tensor | None,
    overlay: Tensor | None,
    overlay_index: Tensor | None,
    bias: Tensor | None,  # (gates * H,), bias_hh; modReLU's own
    layout: Sequence[int],
    kind: str,  # a key of GATES
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # out (S, H), hT (B, H), cT (B, H), workspace (S, k * H)
    """One layer in one direction over a packed batch."""
    gates_x = x if w_ih is None else x @ w_ih.T
    gates_x = gates_x if bias_ih is None else gates_x + bias_ih
    sizes = batch_sizes.tolist()
    starts = _starts(sizes)
    state = h0 if c0 is None else torch.cat([h0, c0], dim=1)
    hidden, steps = h0.shape[1], len(sizes)
    out: list[Tensor] = [h0[:0]] * steps
    saved: list[Tensor] = [h0[:0]] * steps
    active, finished = (state[: sizes[-1]] if reverse and steps else state), []
    inner, outer = (None, bias) if kind in MODRELU else (bias, None)
    for t in reversed(range(steps)) if reverse else range(steps):
        n = sizes[t]
        if n < active.shape[0]:
            finished.append(active[n:])
            active = active[:n]
        elif n > active.shape[0]:
            active = torch.cat([active, state[active.shape[0] : n]])
        product = kron_matmul(active[:, :hidden], stages, diagonal, overlay, overlay_index, inner, layout)
        h, c, saved[t] = cell(
            gates_x[starts[t] : starts[t + 1]], product, active[:, :hidden], active[:, hidden:], kind, outer
        )
        out[t] = h
        active = h if c0 is None else torch.cat([h, c], dim=1)
    state = torch.cat([active, *reversed(finished)])
    outputs = torch.cat(out) if steps else h0[:0]
    workspace = torch.cat(saved) if steps else h0.new_empty(0, WORKSPACE[kind] * hidden)
    return outputs, state[:, :hidden], None if c0 is None else state[:, hidden:], workspace


def recurrence_backward(
    grad_out: Tensor | None,  # (S, H)
    grad_h: Tensor | None,  # (B, H)
    grad_c: Tensor | None,  # (B, H)
    out: Tensor,
    workspace: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    dense: Tensor,  # (gates * H, H)
    bias: Tensor | None,  # modReLU's
    kind: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (gates before activation, W_hh h + b_hh, h0, c0), written out by hand.

    The first two differ only for the GRU, whose reset gate stands between them. The gradients of the matrix follow
    from the second and `previous_states` in one step.
    """
    sizes = batch_sizes.tolist()
    starts, batch = _starts(sizes), h0.shape[0]
    h_before = previous_states(out, sizes, h0, reverse)
    c_before = None if c0 is None else previous_states(workspace[:, -c0.shape[1] :], sizes, c0, reverse)
    grad_gates = out.new_empty(out.shape[0], dense.shape[0])
    grad_product = torch.empty_like(grad_gates)
    dh = torch.zeros_like(h0) if grad_h is None else grad_h.clone()
    dc = torch.zeros_like(h0) if grad_c is None else grad_c.clone()
    for t in range(len(sizes)) if reverse else reversed(range(len(sizes))):
        rows, n = slice(starts[t], starts[t + 1]), min(sizes[t], batch)
        step = dh[:n] if grad_out is None else dh[:n] + grad_out[rows]
        saved = workspace[rows]
        if kind == "lstm":
            assert c_before is not None
            i, f, g, o, c = saved.chunk(5, dim=1)
            tanh_c = c.tanh()
            total = dc[:n] + step * o * (1 - tanh_c**2)
            di, df = total * g * i * (1 - i), total * c_before[rows] * f * (1 - f)
            dg, do = total * i * (1 - g**2), step * tanh_c * o * (1 - o)
            grad_gates[rows] = grad_product[rows] = torch.cat([di, df, dg, do], dim=1)
            dc[:n] = total * f
            dh[:n] = grad_product[rows] @ dense
        elif kind == "gru":
            r, z, gate, hn = saved.chunk(4, dim=1)
            dn = step * (1 - z) * (1 - gate**2)
            dz = step * (h_before[rows] - gate) * z * (1 - z)
            dr = dn * hn * r * (1 - r)
            grad_gates[rows] = torch.cat([dr, dz, dn], dim=1)
            grad_product[rows] = torch.cat([dr, dz, dn * r], dim=1)
            dh[:n] = grad_product[rows] @ dense + step * z
        elif kind in MODRELU:
            grad_gates[rows] = grad_product[rows] = modrelu_backward(saved, bias, step, kind)
            dh[:n] = grad_product[rows] @ dense
        else:
            h = out[rows]
            grad_gates[rows] = grad_product[rows] = step * ((h > 0).to(h.dtype) if kind == "rnn_relu" else 1 - h**2)
            dh[:n] = grad_product[rows] @ dense
    return grad_gates, grad_product, dh, dc


def previous_states(out: Tensor, sizes: Sequence[int], initial: Tensor, reverse: bool) -> Tensor:  # (S, H)
    """The state that each packed row started from."""
    starts, pieces = _starts(sizes), []
    for t, n in enumerate(sizes):
        if reverse:
            following = sizes[t + 1] if t + 1 < len(sizes) else 0
            pieces += [out[starts[t + 1] : starts[t + 1] + following], initial[following:n]]
        else:
            pieces.append(out[starts[t - 1] : starts[t - 1] + n] if t else initial[:n])
    return torch.cat(pieces) if pieces else out[:0]


def cell(
    x: Tensor, product: Tensor, h: Tensor, c: Tensor, kind: str, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: (input's share, W_hh h + b_hh, state, modReLU's bias) -> (h, c, what the backward pass needs)."""
    if kind == "lstm":
        i, f, g, o = (x + product).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, torch.cat([i, f, g, o, c], dim=-1)
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), product.chunk(3, dim=-1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return n + z * (h - n), c, torch.cat([r, z, n, hn], dim=-1)
    total = x + product
    if kind in MODRELU:
        return planar(modrelu(state_of(total, kind), bias)), c, total
    return total.relu() if kind == "rnn_relu" else total.tanh(), c, x[:, :0]


def modrelu(z: Tensor, bias: Tensor | None) -> Tensor:
    """relu(|z| + b) z/|z| of real or complex z, 0 with derivative 0 where z is 0 (Arjovsky, Shah, Bengio 2016,
    equation 8)."""
    size = z.abs()
    return (size if bias is None else size + bias).relu() * z.sgn()


def modrelu_backward(total: Tensor, bias: Tensor | None, grad: Tensor, kind: str) -> Tensor:
    """The gradient of modReLU's argument: along z as it comes, across z stretched as z is."""
    z, grad = state_of(total, kind), state_of(grad, kind)
    size, unit = z.abs(), z.sgn()
    length = size if bias is None else size + bias
    along = (unit.conj() * grad).real * unit if z.is_complex() else grad
    result = along + length / size * (grad - along)
    return planar(result.masked_fill((size == 0) | (length <= 0), 0))


def modrelu_bias_backward(total: Tensor, grad_total: Tensor, kind: str) -> Tensor:
    """The gradient of modReLU's bias by row: what passed along z."""
    unit, passed = state_of(total, kind).sgn(), state_of(grad_total, kind)
    return (unit.conj() * passed).real if unit.is_complex() else unit * passed


def state_of(planes: Tensor, kind: str) -> Tensor:
    """A complex state from its real parts followed by its imaginary parts: (..., H) -> (..., H / 2) complex."""
    if kind != "rnn_modrelu_complex":
        return planes
    real, imaginary = planes.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def planar(state: Tensor) -> Tensor:
    """The way back: the real parts of a complex state followed by its imaginary ones; a real one as it is."""
    return torch.cat([state.real, state.imag], dim=-1) if state.is_complex() else state


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for n in sizes:
        starts.append(starts[-1] + n)
    return starts


def _index(gates: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(gates, device=like.device)
