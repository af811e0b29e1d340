"""Files that are programs and run, TorchScript and Keras: modules answer in the place of their layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import nn


class Program(Protocol):
    """A file that was loaded, code and all.

    Attributes:
        layers: recurrent layers whose calls can be met.
    """

    layers: Collection[str]

    def network(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """What the file computes with these modules in the place of layers, (time, batch, features) where they take
        sequences. Its arguments are the inputs by name, its outputs tensors; it can be hooked at its modules, and gives
        no gradients."""


def place(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Makes modules submodules of a network, under dotted names."""
    for name, module in modules.items():
        *around, last = name.split(".")
        home = network
        for part in around:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        home.add_module(last, module)
