"""How well a network carries state and gradient while it is trained.

Of each recurrent matrix: condition number, spectral norm, unitarity defect. Of each recurrent layer: the norm of the
gradient that reaches its state at each step, |dL/dh_t|, through everything that comes after it. A matrix far from
unitary makes it vanish or explode on the way back in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kruify.analysis.conditioning import conditioning
from kruify.layers import KRU
from kruify.layers.base import GATES
from kruify.layers.matrix import exact
from kruify.tasks.base import Task, device_of, to_device
from kruify.training.batches import train_batches
from kruify.training.randomness import derived_seed, isolated_generators, seed_all
from kruify.training.recurrent import RECURRENT

POINTS = 32  # steps of a sequence at which the gradient is measured


@dataclass(frozen=True)
class GateConditioning:
    """Of one gate of one recurrent matrix; kruify.analysis.conditioning says what each measure is."""

    name: str
    gate: str
    condition_number: float
    spectral_norm: float
    unitarity_defect: float


@dataclass(frozen=True)
class GradientNorms:
    """`norms[i]` is |dL/dh_t| over the batch at step t = `steps[i]`, counted from 1."""

    steps: list[float]
    norms: list[float]


@dataclass(frozen=True)
class RecurrentConditioning:
    """Conditioning of every recurrent matrix, and the gradient through time of every layer, by name.

    The gradient is that of the loss of the train split's first batch; layers that run in both directions, over packed
    sequences or step by step (cells) have none.
    """

    matrices: list[GateConditioning]
    gradient: dict[str, GradientNorms]


def recurrent_conditioning(model: nn.Module, task: Task, seed: int) -> RecurrentConditioning:
    """Measures `model` and leaves no trace in it."""
    return RecurrentConditioning(list(matrix_conditioning(model)), gradient_through_time(model, task, seed))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (*RECURRENT, KRU))}


def matrix_conditioning(model: nn.Module) -> Iterator[GateConditioning]:
    """Yields the conditioning of each gate of each recurrent matrix of the model's recurrent layers."""
    kind_of = {len(gates): kind for kind, gates in GATES.items()}
    for prefix, layer in _layers(model).items():
        for name, _ in (*layer.named_parameters(recurse=False), *layer.named_children()):
            if not name.startswith("weight_hh"):
                continue
            dense = exact(getattr(layer, name))
            gates = GATES[kind_of[dense.shape[0] // int(layer.hidden_size)]]  # type: ignore[arg-type]
            for gate, matrix in zip(gates, dense.chunk(len(gates)), strict=True):
                c = conditioning(matrix)
                full_name = f"{prefix}.{name}" if prefix else name
                yield GateConditioning(full_name, gate, c.condition_number, c.spectral_norm, c.unitarity_defect)


def gradient_through_time(model: nn.Module, task: Task, seed: int) -> dict[str, GradientNorms]:
    """Layer -> the norms of dL/dh_t over one batch, at no more than POINTS of its steps."""
    modes = [(module, module.training) for module in model.modules()]
    layers = {
        name: layer
        for name, layer in _layers(model).items()
        if hasattr(layer, "batch_first") and not getattr(layer, "bidirectional", False)
    }
    try:
        with isolated_generators(), torch.enable_grad(), ExitStack() as stack:
            model.eval()
            for layer in layers.values():
                layer.train()  # cuDNN has no backward pass in evaluation mode
            seed_all(seed, "conditioning")
            batch = to_device(next(iter(train_batches(task, derived_seed(seed, "conditioning")))), device_of(model))
            probes = {name: stack.enter_context(_probed(layer)) for name, layer in layers.items()}
            loss = task.loss(task.forward(model, batch), batch)
            zeros = [zero for pairs in probes.values() for _, zero in pairs]
            grads = iter(torch.autograd.grad(loss, zeros, allow_unused=True) if zeros else ())
    finally:
        for module, training in modes:
            module.training = training
    norms = {
        name: [0.0 if g is None else float(g.norm()) for _, g in zip(p, grads, strict=False)]
        for name, p in probes.items()
    }
    return {
        name: GradientNorms([float(t) for t, _ in probes[name]], values) for name, values in norms.items() if values
    }


@contextmanager
def _probed(layer: Any) -> Iterator[list[tuple[int, Tensor]]]:
    """Within the block the layer's first call runs in pieces; between them a zero is added to the last layer's h_t, in
    the state and in the output alike. The gradient of that zero is dL/dh_t. Yields (t, zero), filled by the call."""
    probes: list[tuple[int, Tensor]] = []
    original = layer.forward

    def forward(input: Any, hx: Any = None) -> Any:
        if probes or not isinstance(input, Tensor) or input.dim() != 3:
            return original(input, hx)
        time = 1 if layer.batch_first else 0
        steps = input.shape[time]
        ends = sorted({max(1, round(i * steps / POINTS)) for i in range(1, POINTS + 1)})
        outputs, state = [], hx
        for start, end in pairwise([0, *ends]):
            output, state = original(input.narrow(time, start, end - start), state)
            zero = output.new_zeros(output.select(time, -1).shape).requires_grad_()
            probes.append((end, zero))
            last = (output.select(time, -1) + zero).unsqueeze(time)
            outputs += [output.narrow(time, 0, end - start - 1), last]
            state = (_add(state[0], zero), *state[1:]) if isinstance(state, tuple) else _add(state, zero)
        return torch.cat(outputs, time), state

    layer.forward = forward
    try:
        yield probes
    finally:
        del layer.forward


def _add(
    h: Tensor,  # (layers, batch, size)
    zero: Tensor,  # (batch, size), or (batch, 2 * size): real and imaginary parts of a complex state
) -> Tensor:
    change = torch.complex(*zero.chunk(2, dim=-1)) if h.is_complex() else zero
    return torch.cat([h[:-1], (h[-1] + change).unsqueeze(0)])
