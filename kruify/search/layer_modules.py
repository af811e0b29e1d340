"""The recurrent layers of a file as modules that can run: those of sequences take (time, batch, features)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kruify.conversion import Conversion
from kruify.conversion.build import build_dense, build_layer
from kruify.conversion.check import load_tensors
from kruify.conversion.locate import AnyTensor, RecurrentLayer
from kruify.layers.storage import mark, within


def dense_module(layer: RecurrentLayer, tensors: Mapping[str, AnyTensor], path: Path) -> nn.Module:
    """A layer of a dense file, in float32."""
    module: Any = build_dense(replace(layer, dtype="float32"))
    if not layer.cell:
        module.batch_first = False
    load_tensors(module, {name: tensors[layer.full_name(name)] for name in module.state_dict()}, str(path))
    dense: nn.Module = module.requires_grad_(False).eval()
    return dense


def small_module(name: str, conversion: Conversion) -> nn.Module:
    """A layer of what a file was converted into."""
    item = next(item for item in conversion.plan.layers if item.layer.name == name)
    module: Any = build_layer(item)
    if not item.layer.cell:
        module.batch_first = False
    load_tensors(module, {n: conversion.tensors[item.layer.full_name(n)] for n in module.state_dict()})
    mark(module, within(conversion.storage, name, module))
    small: nn.Module = module
    return small
