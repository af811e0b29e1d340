"""Layers beside the recurrent ones, nn.Linear and nn.Embedding: where the bytes of the whole file count, they do, too.

An output layer of 88 x 256 takes 62 % of a small file (JSB chorales, 32 times smaller) if it stays dense. A network may
use the weight of a layer in other ways than by calling it: then it stays dense, which a run tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.calibration import Calibration
from kruify.conversion.computed import copied, state_of
from kruify.conversion.locate import AnyTensor, RecurrentLayer, beside, describe
from kruify.conversion.modules import swap
from kruify.conversion.plan import make_plan
from kruify.errors import PlanError
from kruify.tasks.base import evaluating, to_device

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NARROW = 16
"""Rows or columns below which a weight has next to nothing to save beside others, and stays dense."""
WIDE = 4096  # columns up to which a weight is fitted: memory grows with their square, time with their cube
TOLERANCE = 1e-3  # relative to the largest finite output


def layers_beside(model: nn.Module, task: Calibration, seed: int = 0) -> list[RecurrentLayer]:
    """The linear layers and embeddings of a network that can be factored: torch's own, not inside of another layer of
    torch.nn, their weights not tied to another tensor, and used by a call of the layer alone, as a batch shows.

    An embedding of fewer rows than columns, as of letters, is left out: on g2p-en, 32 times smaller, the bytes that
    that of 74 sounds gave to other matrices were worth less, a word error of 0.483 (0.474 before).
    """
    tied = ties(as_lazy(state_of(model)))
    shared = {*tied, *tied.values()}
    modules = dict(model.named_modules(remove_duplicate=False))

    def free(name: str) -> bool:
        parent = modules[name.rpartition(".")[0]]
        own = isinstance(parent, CONTAINERS) or not type(parent).__module__.startswith("torch.nn")
        return own and f"{name}.weight" not in shared

    found = [
        describe(name, module)
        for name, module in modules.items()
        if name and _is_plain(module) and free(name) and _has_size(*module.get_parameter("weight").shape)
    ]
    if not found or _same_function(model, found, task, seed):
        return found
    return [layer for layer in found if _same_function(model, [layer], task, seed)]


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers whose inputs the rounding to four bits wants to know (conversion.four_bits), however
    few their rows and columns are."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name and type(module) is nn.Linear and module.in_features <= WIDE]


def _is_plain(module: nn.Module) -> bool:
    if "weight" not in module._parameters:  # it is computed
        return False
    if type(module) is nn.Embedding:
        words = module.num_embeddings > module.embedding_dim
        return words and module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    return type(module) is nn.Linear


def _has_size(rows: int, cols: int) -> bool:
    return min(rows, cols) >= NARROW and cols <= WIDE


def stored_beside(tensors: Mapping[str, AnyTensor], wanted: RecurrentLayer) -> RecurrentLayer:
    """The layer that a plan names, as a state dict holds it.

    Raises:
        PlanError: there is none.
    """
    weight, bias = (tensors.get(wanted.full_name(part)) for part in ("weight", "bias"))
    if weight is None or len(weight.shape) != 2:
        raise PlanError(f"the plan names layer '{wanted.name}', which the model does not have")
    return replace(beside(wanted.name, wanted.kind, weight, bias is not None), dtype=wanted.dtype)


def _same_function(model: nn.Module, layers: Sequence[RecurrentLayer], task: Calibration, seed: int) -> bool:
    """Whether the network gives what it gave, for a batch, with a factor of full size in place of each weight."""
    try:
        whole = {layer.full_name("weight"): ["x".join(map(str, layer.shape("weight")))] for layer in layers}
        swapped = swap(copied(model), make_plan(layers, "dense", "dense", chosen=whole))
        for name in whole:
            factor = swapped.get_parameter(f"{name}.terms.0.factors.0")
            factor.data.copy_(model.get_parameter(name)[None, None])
        (batch,) = itertools.islice(task.batches("train", seed=seed), 1)  # once: a data set may add noise of its own
        outputs = []
        for network in (model, swapped):
            with evaluating(network) as device:
                outputs.append(task.forward(network, to_device(batch, device)))
        ours, theirs = outputs
        largest = float(ours.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-6))  # what is masked is -inf
        return torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * largest, equal_nan=True)
    except Exception:  # whatever the network does with what is no tensor any more
        return False
