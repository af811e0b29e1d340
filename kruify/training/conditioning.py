"""How well a network carries state and gradient while it is trained.

Of each recurrent matrix: condition number, spectral norm, unitarity defect. Of each recurrent layer: the norm of the
gradient that reaches its state at each step, |dL/dh_t|, through everything that comes after it. A matrix far from
unitary makes it vanish or explode on the way back in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kruify.analysis.conditioning import conditioning
from kruify.layers import KRU
from kruify.layers.base import GATES
from kruify.layers.matrix import exact
from kruify.tasks.base import Task, device_of, to_device
from kruify.training.randomness import isolated, mix, seed_all
from kruify.training.recurrent import RECURRENT

POINTS = 32  # moments of a sequence at which the gradient is measured


def measure(model: nn.Module, task: Task, seed: int) -> dict[str, Any]:
    """Return {"matrices": [...], "gradient": {layer: {"steps": [...], "norms": [...]}}}, leaving no trace in `model`.

    "matrices" has `name gate condition_number spectral_norm unitarity_defect` of each gate. "gradient" is that of the
    loss of the train split's first batch; layers that run in both directions, over packed sequences or step by step
    (cells) have none.
    """
    return {"matrices": list(matrices(model)), "gradient": gradient_through_time(model, task, seed)}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> recurrent layer or cell."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (*RECURRENT, KRU))}


def matrices(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the conditioning of each gate of each recurrent matrix of the model's recurrent layers."""
    kind_of = {len(gates): kind for kind, gates in GATES.items()}
    for prefix, layer in layers_of(model).items():
        held = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_children())]
        for name in held:
            if not name.startswith("weight_hh"):
                continue
            dense = exact(getattr(layer, name))
            gates = GATES[kind_of[dense.shape[0] // int(layer.hidden_size)]]  # type: ignore[arg-type]
            for gate, matrix in zip(gates, dense.chunk(len(gates)), strict=True):
                found = conditioning(matrix)
                yield {
                    "name": f"{prefix}.{name}" if prefix else name,
                    "gate": gate,
                    "condition_number": found.condition_number,
                    "spectral_norm": found.spectral_norm,
                    "unitarity_defect": found.unitarity_defect,
                }


def gradient_through_time(model: nn.Module, task: Task, seed: int) -> dict[str, dict[str, list[float]]]:
    """Return layer -> steps (from 1) and the norms of dL/dh_t over the batch there, t at most POINTS of the steps."""
    modes = [(module, module.training) for module in model.modules()]
    layers = {name: layer for name, layer in layers_of(model).items() if _unrolls(layer)}
    try:
        with isolated(), torch.enable_grad(), ExitStack() as stack:
            model.eval()
            for layer in layers.values():
                layer.train()  # cuDNN has no backward pass in evaluation mode
            seed_all(seed, "conditioning")
            batch = next(iter(task.batches("train", seed=mix(seed, "conditioning") % 2**31)))
            probes = {name: stack.enter_context(_probed(layer)) for name, layer in layers.items()}
            batch = to_device(batch, device_of(model))
            loss = task.loss(task.forward(model, batch), batch)
            found = {name: pair for name, pair in probes.items() if pair}
            flat = [probe for pairs in found.values() for _, probe in pairs]
            grads = iter(torch.autograd.grad(loss, flat, allow_unused=True) if flat else ())
    finally:
        for module, training in modes:
            module.training = training
    result: dict[str, dict[str, list[float]]] = {}
    for name, pairs in found.items():
        norms = [0.0 if grad is None else float(grad.norm()) for grad in (next(grads) for _ in pairs)]
        result[name] = {"steps": [float(step) for step, _ in pairs], "norms": norms}
    return result


def _unrolls(layer: nn.Module) -> bool:
    return not getattr(layer, "bidirectional", False) and hasattr(layer, "batch_first")


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
