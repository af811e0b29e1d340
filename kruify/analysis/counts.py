"""What a network costs in numbers: parameters, and multiply-adds per time step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kruify.analysis.layers import Layers
from kruify.checkpoint import LazyTensor
from kruify.checkpoint.tensors import ties
from kruify.conversion import plan_of
from kruify.conversion.locate import RecurrentLayer, locate


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable numbers: in recurrent matrices, in input matrices, in all other tensors, in all of them.

    A tensor that stands in the file under two names counts once, a complex number twice.
    """

    recurrent: int
    input: int
    other: int
    total: int


def count_parameters(layers: Layers) -> ParameterCounts:
    """Trainable numbers in the file."""
    return _count(layers.checkpoint.tensors.lazy, [layer for layer, _ in layers.items])


def count_network(model: nn.Module) -> ParameterCounts:
    """`count_parameters` of a network in memory."""
    layers = [item.layer for item in plan_of(model).layers] + locate(model).layers
    return _count({name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}, layers)


def _count(tensors: Mapping[str, LazyTensor], layers: Sequence[RecurrentLayer]) -> ParameterCounts:
    counts = {"recurrent": 0, "input": 0, "other": 0}
    tied = ties(tensors)
    for name, tensor in tensors.items():
        if tensor.reals and name not in tied:
            counts[_part(name, layers)] += tensor.reals
    return ParameterCounts(**counts, total=sum(counts.values()))


def _part(name: str, layers: Sequence[RecurrentLayer]) -> str:
    for layer in layers:
        for suffix in layer.suffixes:
            for stem, part in (("weight_hh", "recurrent"), ("weight_ih", "input")):
                weight = layer.full_name(stem + suffix)
                if name == weight or name.startswith(f"{weight}."):
                    return part
    return "other"


def multiply_adds(layers: Layers) -> int:
    """Multiply-adds of one step in time of every recurrent layer for one sequence: W_ih, W_hh and projections.

    A complex number times a complex one is four of them, times a real one two.
    """
    total = 0
    for layer, matrices in layers.items:
        for suffix in layer.suffixes:
            for stem, each in (("weight_ih", layer.reals), ("weight_hh", layer.reals**2)):
                rows, cols = layer.shape(stem + suffix)
                structures = matrices.get(stem + suffix)
                count = sum(s.multiply_adds for s in structures) if structures else len(layer.gates) * rows * cols
                total += each * count
            total += layer.proj_size * layer.hidden_size
    return total
