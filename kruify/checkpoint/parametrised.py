"""Compute the weights of parametrised layers from what their files hold, and find parameters that give a wanted weight.

Known: weight norm and spectral norm (torch.nn.utils.parametrizations and the older hooks), pruning masks, weight drop
(fastai's and salesforce's `_raw` weights; nothing is dropped, as in evaluation).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.checkpoint.tensors import LazyTensor


@dataclass(frozen=True)
class Computed:
    """How a weight was computed.

    how: "weight_norm", "spectral_norm", "pruning" or "weight_drop".
    sources: the names that it was computed from, without wrapper prefixes.
    dim: of the norm, None for one norm of the whole tensor.
    """

    how: str
    sources: tuple[str, ...]
    dim: int | None = 0


SOURCES = {"weight_norm": (2,), "spectral_norm": (3,), "pruning": (2,), "weight_drop": (1, 2)}
"""How a weight can be computed, and from how many tensors."""


def compute_weights(
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, Computed], dict[str, str]]:
    """Replace what parametrised layers store by their weights.

    Returns: (tensors with the weights in place of their sources, weight name -> how it was computed, module name ->
    reason for parametrisations that are not known; their tensors stay as they are).
    """
    computed: dict[str, Computed] = {}
    weights: dict[str, LazyTensor] = {}
    unknown: dict[str, str] = {}
    for name in tensors:
        if match := re.fullmatch(r"(.*?)parametrizations\.([^.]+)\.original0?", name):
            weight, base = match.group(1) + match.group(2), name.removesuffix("0")
            found = _new_style(weight, base, tensors)
            if found is None:
                reason = f"its {match.group(2)} is parametrised in a way that kruify cannot compute"
                unknown[match.group(1).rstrip(".")] = reason
        else:
            found = _old_style(name, tensors)
        if found is not None:
            weight, how = found
            if how.how != "weight_drop" and weight in tensors:
                continue  # a plain tensor of that name: these are other things
            computed[weight] = how
            weights[weight] = _lazy(how, tensors)
    return _replace(tensors, computed, weights), computed, unknown


def sources_for(weight: Tensor, how: Computed) -> dict[str, Tensor]:
    """Parameters from which the layer computes `weight` in evaluation, by source name.

    Spectral norm divides by u'Wv; the u written makes that 1, so its length is not 1 and the next training step, which
    normalises it, changes the weight.
    """
    if how.how == "weight_norm":
        norm = _norm(weight, how.dim)
        direction = torch.where(norm == 0, 1, weight)  # zeros have none, and torch would divide by their norm
        return dict(zip(how.sources, (norm, direction), strict=True))
    if how.how == "pruning":
        return dict(zip(how.sources, (weight, torch.ones_like(weight)), strict=True))
    if how.how == "spectral_norm":
        matrix = _matrix(weight, how.dim or 0)
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        u, v = (left[:, 0] / values[0]).to(weight.dtype), right[0].to(weight.dtype)
        return dict(zip(how.sources, (weight, u, v), strict=True))
    return {source: weight for source in how.sources}


def _new_style(weight: str, base: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, Computed] | None:
    prefix = base.removesuffix("original")
    beside = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if beside == {"original0", "original1"}:
        return _weight_norm(weight, f"{base}0", f"{base}1", tensors)
    if beside == {"original", "0._u", "0._v"}:
        return _spectral_norm(weight, (base, f"{prefix}0._u", f"{prefix}0._v"), tensors)
    return None


def _old_style(name: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, Computed] | None:
    if name.endswith("_g") and f"{name[:-2]}_v" in tensors:
        return _weight_norm(name[:-2], name, f"{name[:-2]}_v", tensors)
    if name.endswith("_orig"):
        weight = name.removesuffix("_orig")
        if f"{weight}_mask" in tensors and tensors[f"{weight}_mask"].shape == tensors[name].shape:
            return weight, Computed("pruning", (name, f"{weight}_mask"))
        if f"{weight}_u" in tensors and f"{weight}_v" in tensors:
            return _spectral_norm(weight, (name, f"{weight}_u", f"{weight}_v"), tensors)
    if match := re.fullmatch(r"(.*?)(weight_(?:hh|ih)(?:_l\d+)?(?:_reverse)?)_raw", name):
        before, short = match.groups()
        inner = f"{before}module."
        # fastai keeps the raw weight beside the wrapped layer, salesforce in it.
        weight = (inner if any(other.startswith(inner) for other in tensors) else before) + short
        return weight, Computed("weight_drop", (name, weight) if weight in tensors else (name,))
    return None


def _weight_norm(weight: str, g: str, v: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, Computed] | None:
    shape, norm = tensors[v].shape, tensors[g].shape
    if norm == () or (len(norm) == len(shape) and all(n == 1 for n in norm) and max(shape, default=1) > 1):
        return weight, Computed("weight_norm", (g, v), None)
    dims = [d for d in range(len(shape)) if norm == tuple(n if i == d else 1 for i, n in enumerate(shape))]
    return (weight, Computed("weight_norm", (g, v), dims[0])) if dims else None


def _spectral_norm(
    weight: str, sources: tuple[str, str, str], tensors: Mapping[str, LazyTensor]
) -> tuple[str, Computed] | None:
    shape, u, v = (tensors[name].shape for name in sources)
    for dim, rows in enumerate(shape):  # dim 0 is the default, and what a square matrix is taken for
        if u == (rows,) and v == (tensors[sources[0]].numel // max(rows, 1),):
            return weight, Computed("spectral_norm", sources, dim)
    return None


def _lazy(how: Computed, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    parts = [tensors[name] for name in how.sources]
    like = parts[1] if how.how == "weight_norm" else parts[0]

    def compute(first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Tensor:
        if how.how == "weight_norm" and second is not None:
            return second * (first / _norm(second, how.dim))
        if how.how == "pruning" and second is not None:
            return first * second
        if how.how == "spectral_norm" and second is not None and third is not None:
            return first / torch.dot(second, _matrix(first, how.dim or 0) @ third)
        return first  # weight drop: the raw weight; a copy beside it may have been dropped

    def load() -> Tensor:
        loaded = [part.load() for part in parts]
        if like.dtype in (torch.float16, torch.bfloat16):  # as torch on a GPU: in float32, rounded once
            loaded = [tensor.float() for tensor in loaded]
        return compute(*loaded).to(like.dtype)

    return LazyTensor(like.shape, like.dtype, load)


def _norm(tensor: Tensor, dim: int | None) -> Tensor:
    dims = None if dim is None else [d for d in range(tensor.dim()) if d != dim]
    if dims == []:  # a vector has a norm for each entry; torch takes no dimension for all of them
        return tensor.abs()
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=dim is not None)
    return norm


def _matrix(tensor: Tensor, dim: int) -> Tensor:
    """(dim, everything else), as spectral norm sees a weight."""
    return tensor.movedim(dim, 0).flatten(1)


def _replace(
    tensors: Mapping[str, LazyTensor], computed: Mapping[str, Computed], weights: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    place = {source: weight for weight, how in computed.items() for source in how.sources}
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        weight = place.get(name)
        if weight is None:
            result[name] = tensor
        else:
            result[weight] = weights[weight]
    return result
