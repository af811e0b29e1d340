"""Linear layers beside the recurrent ones: where the bytes of the whole file count, their weights do, too.

An output layer of 88 x 256 takes 62 % of the bytes of a small file (JSB chorales, 32 times smaller) if it stays dense. A
network may use the weight of a layer in other ways than by calling it: then it stays dense, which a run tells.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.calibration import Calibration
from kruify.conversion.computed import state_of
from kruify.conversion.locate import AnyTensor, RecurrentLayer, describe
from kruify.conversion.modules import swap
from kruify.conversion.plan import make_plan
from kruify.errors import PlanError
from kruify.tasks.base import evaluating, to_device

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NARROW = 16
"""Inputs or outputs below which a linear layer has next to nothing to save."""
TOLERANCE = 1e-3  # relative to the largest output


def linear_layers(model: nn.Module, task: Calibration, seed: int = 0) -> list[RecurrentLayer]:
    """The linear layers of a network that can be factored: nn.Linear itself, not inside of another layer of torch.nn,
    its weight not tied to another tensor, and nothing but a call of the layer uses it, as a batch of the task shows."""
    tied = ties(as_lazy(state_of(model)))
    shared = {*tied, *tied.values()}
    parents = dict(model.named_modules(remove_duplicate=False))

    def own(name: str) -> bool:
        parent = parents[name.rpartition(".")[0]]
        return isinstance(parent, CONTAINERS) or not type(parent).__module__.startswith("torch.nn")

    found = [
        describe(name, module)
        for name, module in parents.items()
        if type(module) is nn.Linear
        and name
        and own(name)
        and "weight" in module._parameters
        and min(module.weight.shape) >= NARROW
        and f"{name}.weight" not in shared
    ]
    return found if found and _same_function(model, found, task, seed) else []


def linear_of(tensors: Mapping[str, AnyTensor], wanted: RecurrentLayer) -> RecurrentLayer:
    """The linear layer of that name as a state dict holds it.

    Raises:
        PlanError: there is none.
    """
    weight, bias = (tensors.get(wanted.full_name(part)) for part in ("weight", "bias"))
    if weight is None or len(weight.shape) != 2:
        raise PlanError(f"the plan names layer '{wanted.name}', which the model does not have")
    rows, cols = weight.shape
    return replace(wanted, input_size=cols, hidden_size=rows, bias=bias is not None)


def _same_function(model: nn.Module, layers: list[RecurrentLayer], task: Calibration, seed: int) -> bool:
    """Whether the network gives what it gave, for a batch, with a factor of full size in place of each weight."""
    try:
        whole = {layer.full_name("weight"): ["x".join(map(str, layer.shape("weight")))] for layer in layers}
        plan = make_plan(layers, "dense", "dense", chosen=whole)
        swapped = swap(copy.deepcopy(model), plan)
        for layer in layers:
            factor = swapped.get_parameter(f"{layer.full_name('weight')}.terms.0.factors.0")
            factor.data.copy_(model.get_parameter(layer.full_name("weight"))[None, None])
        outputs = []
        for network in (model, swapped):
            with evaluating(network) as device:
                (batch,) = itertools.islice(task.batches("train", seed=seed), 1)
                outputs.append(task.forward(network, to_device(batch, device)))
        ours, theirs = outputs
        return bool((ours - theirs).abs().max() <= TOLERANCE * ours.abs().max().clamp_min(1e-6))
    except Exception:  # whatever the network does with what is no tensor any more
        return False
