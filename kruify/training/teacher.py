"""The dense network as a teacher: it answers every batch, so it runs on the faster kernels."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from kruify.conversion import convert_module
from kruify.conversion.locate import locate
from kruify.conversion.plan import make_plan
from kruify.ops import has_kernel


def frozen_teacher(teacher: nn.Module, device: torch.device, converted: Collection[str]) -> nn.Module:
    """A copy on `device`, without gradients, in evaluation mode, of the same function to rounding.

    On a CPU its layers `converted` become kruify's, with W_hh whole as their only factor: torch's GRU takes twice the
    time of kruify's kernels there, and no layer takes less.
    """
    layers = [layer for layer in locate(teacher).layers if layer.name in converted]
    if layers and device.type == "cpu" and has_kernel("cpu"):
        whole = {layer.name or "*": "x".join(map(str, layer.shape("weight_hh"))) for layer in layers}
        teacher, _ = convert_module(teacher, make_plan(layers, overrides=whole))
    else:
        teacher = copy.deepcopy(teacher)
    return teacher.to(device).requires_grad_(False).eval()
