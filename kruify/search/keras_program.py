"""A Keras model that runs, built by Keras itself, with modules in the place of its recurrent layers.

Building it calls the classes that its configuration names, so it is done only where the user asks for it. Layers are
told by their numbers: the file and the model name them differently.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kruify.checkpoint.gates import keras_from_torch
from kruify.checkpoint.tensors import LazyTensor
from kruify.conversion.locate import RecurrentLayer
from kruify.errors import UnsupportedError, first_line
from kruify.search.programs import place

BACKEND = "KERAS_BACKEND"


class KerasProgram:
    """A `Program`: the model, ready to run. Its configuration is trusted from here on.

    Args:
        layers: that may be met; left out are stateful ones.
        tensors: of the file, by torch's names.

    Raises:
        UnsupportedError: Keras is not installed, or cannot load it.
    """

    def __init__(self, path: Path, layers: Sequence[RecurrentLayer], tensors: Mapping[str, LazyTensor]) -> None:
        keras = _keras(path)
        try:
            self.model = keras.saving.load_model(path, compile=False, safe_mode=True)
        except Exception as error:  # Keras has no class of its own for what it cannot load
            raise UnsupportedError(f"Keras cannot load it ({first_line(error)})", path) from error
        self.path, self._homes = path, dict[str, list[Any]]()
        for layer in layers:
            weights = {name: tensors[layer.full_name(name)].load() for name in ("weight_ih_l0", "weight_hh_l0")}
            kernels = keras_from_torch(layer.kind, weights, "_l0", 0)
            homes = [home for home, cell in self._recurrent(keras) if _has(cell, kernels)]
            if homes and not any(home.stateful for home in homes):
                self._homes[layer.name] = homes
        self.layers: Collection[str] = self._homes.keys()

    def network(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """As `Program.network`; raises `UnsupportedError` where a mask reaches a layer."""
        met = [(home, module) for name, module in modules.items() for home in self._homes[name]]
        return _Network(self.model, modules, met, self.path)

    def _recurrent(self, keras: Any) -> Iterator[tuple[Any, Any]]:
        """Recurrent layers, a Bidirectional as one, and their first cells."""
        layers, inner = list(self.model._flatten_layers(include_self=False)), set()
        for layer in layers:
            if isinstance(layer, keras.layers.Bidirectional):
                inner |= {id(layer.forward_layer), id(layer.backward_layer)}
                yield layer, getattr(layer.forward_layer, "cell", None)
        for layer in layers:
            if isinstance(layer, keras.layers.RNN) and id(layer) not in inner:
                yield layer, layer.cell


def _keras(path: Path) -> Any:
    """Keras, which reads its backend from the environment once; its own default, TensorFlow, is another installation.

    Raises:
        UnsupportedError: it is not installed.
    """
    unset = BACKEND not in os.environ
    if unset:
        os.environ[BACKEND] = "torch"
    try:
        import keras
    except ImportError as error:
        hint = "Install it: pip install keras"
        raise UnsupportedError(f"to run it needs Keras ({first_line(error)})", path, hint) from error
    finally:
        if unset:
            del os.environ[BACKEND]
    return keras


class _Network(nn.Module):
    def __init__(
        self, model: Any, modules: Mapping[str, nn.Module], met: Sequence[tuple[Any, nn.Module]], path: Path
    ) -> None:
        super().__init__()
        self._model, self._met, self._path = [model], met, path  # with the backend torch it is a module: no submodule
        place(self, modules)

    def forward(self, **inputs: Tensor) -> Any:
        wanted = [value.name for value in self._model[0].inputs]
        if missing := [name for name in wanted if name not in inputs]:
            raise ValueError(f"the sample lacks the input '{missing[0]}'")
        arrays = [inputs[name].numpy() for name in wanted]
        with self._answering(), torch.no_grad():
            found = self._model[0](arrays if len(arrays) > 1 else arrays[0], training=False)
        return tree_map(_tensor, found)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Modules answer the calls of their layers."""
        try:
            for home, module in self._met:
                vars(home)["call"] = self._answer(home, module)  # Keras would track what is set in its own way
            yield
        finally:
            for home, _ in self._met:
                vars(home).pop("call", None)

    def _answer(self, home: Any, module: Any) -> Any:
        from keras import ops

        directions = 1 + module.bidirectional

        def call(sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
            if mask is not None:
                raise UnsupportedError("a mask reaches its recurrent layers, which is not followed", self._path)
            states: Any = None
            if initial_state is not None:  # h, and for an LSTM c, of one direction, then of the other
                several = isinstance(initial_state, list | tuple)
                given = [_tensor(state) for state in (initial_state if several else [initial_state])]
                each = len(given) // directions
                states = tuple(torch.stack(given[at::each]) for at in range(each))
                states = states if each > 1 else states[0]
            output, final = module(_tensor(sequences).transpose(0, 1), states)
            final = final if isinstance(final, tuple) else (final,)
            result = output.transpose(0, 1) if home.return_sequences else torch.cat(tuple(final[0]), -1)
            rest = [state[direction] for direction in range(directions) for state in final] if home.return_state else []
            found = [ops.convert_to_tensor(tensor.numpy(force=True)) for tensor in (result, *rest)]
            return found if rest else found[0]

        return call


def _has(cell: Any, kernels: Mapping[str, Tensor]) -> bool:
    """Whether a cell has these numbers."""
    found = {"kernel": getattr(cell, "kernel", 0.0), "recurrent": getattr(cell, "recurrent_kernel", 0.0)}
    return all(torch.equal(_tensor(found[part]), kernel) for part, kernel in kernels.items())


def _tensor(value: Any) -> Tensor:
    from keras import ops

    return torch.from_numpy(np.array(ops.convert_to_numpy(value)))
