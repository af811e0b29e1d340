"""A TorchScript archive that runs, with modules in the place of its recurrent layers.

The archive is a program: it runs here, and only where the user asks for it. Its calls of torch's recurrent operators
are met on their way to torch (`torch.utils._python_dispatch`), wherever they stand, and told by the weights they bring.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from kruify.errors import UnsupportedError, first_line
from kruify.search.programs import place

aten = torch.ops.aten
PADDED = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""x, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first."""
PACKED = (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
"""data, batch_sizes, states, weights, and so on."""
CELLS = (
    aten.lstm_cell.default,
    aten.gru_cell.default,
    aten.rnn_tanh_cell.default,
    aten.rnn_relu_cell.default,
)
"""x, states, weight_ih, and so on."""
FIRST = ("weight_ih_l0", "weight_ih")
"""By this weight a layer, or a cell, is known."""


class Script:
    """A `Program`: the archive, ready to run on the CPU. Its code is trusted from here on.

    Args:
        layers: that may be met; left out are those whose weights the archive computes.
        prefix: what the archive has before their names.

    Raises:
        UnsupportedError: torch cannot load it.
    """

    def __init__(self, path: Path, layers: Iterable[str], prefix: str = "") -> None:
        try:
            self.script = torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise UnsupportedError(f"torch cannot load it ({first_line(error)})", path) from error
        weights = self.script.state_dict()
        places = {name: [f"{prefix}{name}.{weight}" for weight in FIRST] for name in layers}
        self._places = {
            n: weights[place].data_ptr() for n, found in places.items() for place in found if place in weights
        }
        self.layers: Collection[str] = self._places.keys()

    def network(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """As `Program.network`."""
        return _Network(self.script, modules, {self._places[name]: module for name, module in modules.items()})


class _Network(nn.Module):
    def __init__(self, script: Any, modules: Mapping[str, nn.Module], met: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._script = [script]  # not a submodule: its weights are not this network's
        self._met = met
        place(self, modules)

    def forward(self, **inputs: Any) -> Any:
        _, *arguments = self._script[0].forward.schema.arguments  # after the module itself
        known = [argument.name for argument in arguments]
        if missing := [a.name for a in arguments if a.name not in inputs and not a.has_default_value()]:
            raise ValueError(f"the sample lacks the input '{missing[0]}'")
        if others := [name for name in inputs if name not in known]:
            raise ValueError(f"it has no input '{others[0]}': it takes {', '.join(known)}")
        # Only in inference mode the operators come whole, and not as the products that they are made of.
        with torch.inference_mode(), _Calls(self._met):
            return self._script[0](**inputs)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls modules in the place of recurrent operators.

    Args:
        layers: by the address of their first weight in the archive.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        weight = None
        if func in PADDED:
            weight = args[2][0]
        elif func in PACKED:
            weight = args[3][0]
        elif func in CELLS:
            weight = args[2]
        layer = None if weight is None else self.layers.get(weight.data_ptr())
        if layer is None:
            return func(*args, **(kwargs or {}))
        with torch.inference_mode(False), torch.no_grad():  # layers keep what they compute, and train with it later
            x, states = args[0].clone(), args[2 if func in PACKED else 1]
            states = tuple(s.clone() for s in states) if isinstance(states, list) else states.clone()
            if func in CELLS:
                return layer(x, states)
            if func in PACKED:
                output, final = layer(PackedSequence(x, args[1].clone()), states)
                output = output.data
            elif args[8]:  # batch_first
                output, final = layer(x.transpose(0, 1), states)
                output = output.transpose(0, 1)
            else:
                output, final = layer(x, states)
        return (output, *(final if isinstance(final, tuple) else (final,)))
