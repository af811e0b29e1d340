"""Read Keras weights: .keras archives, .weights.h5, the older .h5 of a whole model. No layer is built, no code runs.

Needs `pip install kruify[keras]` (h5py). Cells are found by their kernel, recurrent kernel and bias, so that a file
without a configuration can be read, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.archive import Archive
from kruify.checkpoint.file_bytes import parse_json
from kruify.checkpoint.gates import GATES, keras_cell
from kruify.checkpoint.modules import ModuleHint
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
CLASSES = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "rnn"}
CELLS = {"lstm_cell": "lstm", "gru_cell": "gru", "simple_rnn_cell": "rnn"}
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
FILTERS = (1, 2, 3)
"""deflate, shuffle, fletcher32: others would be loaded as plug-ins."""


@dataclass
class KerasFile:
    """Tensors by torch's names for recurrent cells, by their own for the rest."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    hints: dict[str, ModuleHint] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    # layer and direction -> (kind, {"kernel": path in the file, ...}, bias rows)
    parts: dict[tuple[str, str], tuple[str, dict[str, str], int]] = field(default_factory=dict)


@dataclass
class _Cell:
    kind: str
    layer: str
    title: str  # the layer's name in the configuration
    backward: bool
    parts: dict[str, LazyTensor]
    paths: dict[str, str]


def read_archive(path: Path, archive: Archive) -> KerasFile:
    """A .keras archive: configuration and weights."""
    config = parse_json(archive.read("config.json", limits.JSON), "its configuration", path)
    data = archive.read("model.weights.h5", max(archive.size, limits.SLACK))
    return _read(path, io.BytesIO(data), config)


def read_h5(path: Path) -> KerasFile:
    """A .h5 file: weights, or a whole model with its configuration in an attribute."""
    return _read(path, path, None)


def _read(path: Path, source: Any, config: Any) -> KerasFile:
    try:
        import h5py
    except ImportError as error:
        raise UnsupportedError("Keras files need an extra", path, "Install it: pip install 'kruify[keras]'") from error
    try:
        file = h5py.File(source, "r")
        if config is None and "model_config" in file.attrs:
            text = file.attrs["model_config"]
            config = parse_json(text if isinstance(text, bytes) else str(text), "its configuration", path)
        datasets = dict(_datasets(file, "", 0, path, [0]))
        names = {parent: _vars_name(file, parent) for name in datasets for parent in _parents(name)}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"its HDF5 structure is damaged ({type(error).__name__})", path) from error
    found = KerasFile()
    layers = dict(_layers(config, 0)) if config is not None else {}
    left = dict(datasets)
    for cell in _cells(datasets, names):
        for part in cell.paths.values():
            left.pop(part)
        _add(cell, layers, found)
    found.tensors.update(left)
    return found


def _datasets(group: Any, at: str, depth: int, path: Path, count: list[int]) -> Iterator[tuple[str, LazyTensor]]:
    """Every dataset by its path. Links that lead elsewhere, in the file or out of it, are refused."""
    import h5py

    if depth > limits.DEPTH:
        raise UnsafeError("its groups are nested too deeply", path)
    for name in group:
        count[0] += 1
        if count[0] > limits.ENTRIES or len(name) > limits.NAME:
            raise UnsafeError("it has too many entries, or too long names", path)
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise UnsafeError(f"its entry {name[:80]} is a link to elsewhere", path)
        child, below = group[name], f"{at}/{name}" if at else name
        if isinstance(child, h5py.Group):
            yield from _datasets(child, below, depth + 1, path, count)
        elif isinstance(child, h5py.Dataset) and child.dtype.kind in "fiub":
            yield below, _dataset(child, below, path)


def _dataset(data: Any, name: str, path: Path) -> LazyTensor:
    plist = data.id.get_create_plist()
    if data.external or data.is_virtual:
        raise UnsafeError(f"its entry {name[:80]} keeps its numbers in another file", path)
    if any(plist.get_filter(i)[0] not in FILTERS for i in range(plist.get_nfilters())):
        raise UnsafeError(f"its entry {name[:80]} needs a plug-in to be unpacked", path)
    shape = tuple(int(n) for n in data.shape)
    try:
        dtype = torch.from_numpy(_native(data.dtype)).dtype
    except TypeError as error:
        raise UnsupportedError(f"its entry {name[:80]} has dtype {data.dtype}", path) from error
    if prod(shape) * dtype.itemsize > limits.RATIO * data.id.get_storage_size() + limits.SLACK:
        raise UnsafeError(f"its entry {name[:80]} asks for far more than the file holds", path)

    def load() -> Tensor:
        try:
            numbers = data[()]
        except (OSError, RuntimeError, ValueError) as error:
            raise CorruptError(f"its entry {name[:80]} is damaged", path) from error
        return torch.tensor(numbers.astype(numbers.dtype.newbyteorder("="))).reshape(shape)

    return LazyTensor(shape, dtype, load)


def _native(dtype: Any) -> Any:
    import numpy as np

    return np.empty(0, dtype.newbyteorder("="))


def _parents(name: str) -> list[str]:
    """The groups around a dataset that may carry a name: its own and, for a cell, the layers' around the cell."""
    parent = name.rpartition("/")[0]
    layer = parent.removesuffix("/cell/vars")
    return [p for p in (parent, f"{layer}/vars", f"{layer.rpartition('/')[0]}/vars") if p]


def _vars_name(file: Any, group: str) -> str:
    """The `name` attribute that Keras 3 gives the group of a layer's variables."""
    attribute = file[group].attrs.get("name", "") if group in file else ""
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def _cells(datasets: dict[str, LazyTensor], names: dict[str, str]) -> Iterator[_Cell]:
    groups: dict[str, dict[str, str]] = {}
    for name in datasets:
        parent, _, leaf = name.rpartition("/")
        groups.setdefault(parent, {})[leaf.removesuffix(":0")] = name
    for parent, leaves in groups.items():
        if parent.endswith("cell/vars"):  # Keras 3
            short = {"0": "kernel", "1": "recurrent", "2": "bias"}
            group = parent.removesuffix("/cell/vars")
            backward, cell = group.endswith("/backward_layer"), names[parent]
            group = re.sub(r"/(forward|backward)_layer$", "", group)
            layer, title = group.removeprefix("layers/").replace("/layers/", "/"), names.get(f"{group}/vars", "")
        elif "recurrent_kernel" in leaves:  # Keras 2
            short = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
            pieces = parent.removeprefix("model_weights/").split("/")
            cell, backward = pieces[-1], any(p.startswith("backward_") for p in pieces[1:])
            layer = title = pieces[0]
        else:
            continue
        paths = {part: leaves[leaf] for leaf, part in short.items() if leaf in leaves}
        parts = {part: datasets[name] for part, name in paths.items()}
        kind = _kind(cell, parts)
        if kind:
            yield _Cell(kind, layer.replace("/", "."), title, backward, parts, paths)


def _kind(cell: str, parts: dict[str, LazyTensor]) -> str | None:
    """Kind by the shapes, and by the cell's name where the shapes do not decide."""
    if not {"kernel", "recurrent"} <= set(parts):
        return None
    kernel, recurrent = parts["kernel"].shape, parts["recurrent"].shape
    if len(kernel) != 2 or len(recurrent) != 2 or kernel[1] != recurrent[1] or not recurrent[0]:
        return None
    named = next((kind for name, kind in CELLS.items() if cell.startswith(name)), None)
    fits = [kind for kind, gates in GATES.items() if recurrent[1] == gates * recurrent[0]]
    return named if named in fits else (fits[0] if fits and named is None else None)


def _layers(config: Any, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layer name, its configuration) for every recurrent layer in a model's configuration."""
    if depth > limits.DEPTH:
        return
    if isinstance(config, dict):
        inner = config.get("config")
        if config.get("class_name") in CLASSES and isinstance(inner, dict) and isinstance(inner.get("name"), str):
            yield inner["name"], inner
        if config.get("class_name") == "Bidirectional" and isinstance(inner, dict):
            layer = inner.get("layer")
            if isinstance(layer, dict) and isinstance(layer.get("config"), dict):
                yield str(inner.get("name")), layer["config"]
        for value in config.values():
            yield from _layers(value, depth + 1)
    elif isinstance(config, list):
        for value in config:
            yield from _layers(value, depth + 1)


def _add(cell: _Cell, layers: dict[str, dict[str, Any]], found: KerasFile) -> None:
    name = cell.layer
    if reason := _refusal(cell, layers.get(cell.title, {})):
        found.skipped[name] = reason
        found.tensors = {n: t for n, t in found.tensors.items() if not n.startswith(f"{name}.")}
        found.hints.pop(name, None)
    if name in found.skipped:
        for part, path in cell.paths.items():
            found.tensors[path] = cell.parts[part]
        return
    suffix = "_l0_reverse" if cell.backward else "_l0"
    for short, tensor in keras_cell(cell.kind, cell.parts, suffix).items():
        found.tensors[f"{name}.{short}"] = tensor
    rows = len(cell.parts["bias"].shape) if "bias" in cell.parts else 0
    found.parts[name, suffix] = (cell.kind, cell.paths, rows)
    layer = layers.get(cell.title, {})
    both = cell.backward or name in found.hints
    options: dict[str, bool | int | float | str] = {
        "mode": cell.kind.upper(),
        "input_size": cell.parts["kernel"].shape[0],
        "hidden_size": cell.parts["recurrent"].shape[0],
        "num_layers": 1,
        "bias": "bias" in cell.parts,
        "bidirectional": both,
        "batch_first": True,
    }
    if isinstance(dropout := layer.get("dropout"), float | int):
        options["dropout"] = float(dropout)
    if cell.kind == "rnn" and layer.get("activation") in ("tanh", "relu"):
        options["nonlinearity"] = layer["activation"]
    found.hints[name] = ModuleHint(f"keras.{cell.kind.upper()}", options)


def _refusal(cell: _Cell, layer: dict[str, Any]) -> str | None:
    """Why torch has no such layer, None if it has."""
    bias = cell.parts.get("bias")
    width = cell.parts["recurrent"].shape[1]
    if bias is not None and bias.shape not in ((width,), (2, width)):
        return f"its bias has shape {list(bias.shape)}"
    if cell.kind == "gru" and (layer.get("reset_after") is False or (bias is not None and len(bias.shape) == 1)):
        return "it is a GRU that resets before the matmul (reset_after=False), which torch has no equivalent for"
    expected = {"rnn": ("tanh", "relu")}.get(cell.kind, ("tanh",))
    if layer.get("activation", "tanh") not in expected or layer.get("recurrent_activation", "sigmoid") != "sigmoid":
        return "its activations are not torch's"
    return None
