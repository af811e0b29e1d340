"""Read Keras weights: .keras archives, .weights.h5, the older .h5 of a whole model. No layer is built, no code runs.

Needs `pip install kruify[keras]` (h5py). Cells are found by their kernel, recurrent kernel and bias, so that a file
without a configuration can be read, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from kruify.checkpoint.safe_unpickler import words
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
CLASSES = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "rnn"}
CELLS = {"lstm_cell": "lstm", "gru_cell": "gru", "simple_rnn_cell": "rnn"}
CELL_CLASSES = {"LSTMCell": "lstm", "GRUCell": "gru", "SimpleRNNCell": "rnn"}
CUDNN = {"CuDNNLSTM": "lstm", "CuDNNGRU": "gru"}
ASSUMED = {
    "lstm": "it runs forward, with the activations tanh and sigmoid",
    "gru": "it runs forward, with the activations tanh and sigmoid, and resets after the matmul",
    "rnn": "it runs forward, with the activation tanh",
}
"""What is taken for granted where a file has weights and no configuration."""
LEFT = {
    "stateful": "every batch begins with a state of zeros (the file says stateful)",
    "zero_output_for_mask": "no step is masked (the file says zero_output_for_mask)",
}
"""Settings that a layer of torch leaves to its caller -> what is taken for granted."""
MASKED = "no step is masked (the file has a layer that masks)"
READ = words("units use_bias activation recurrent_activation go_backwards time_major reset_after dropout")
INERT = words("""
    name trainable dtype return_sequences return_state unroll implementation use_cudnn seed recurrent_dropout
    kernel_initializer recurrent_initializer bias_initializer unit_forget_bias kernel_regularizer
    recurrent_regularizer bias_regularizer activity_regularizer kernel_constraint recurrent_constraint bias_constraint
    batch_input_shape batch_shape input_shape input_dim input_length input_dtype sparse ragged
""")
"""Settings that say nothing of what a trained layer computes."""
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
FILTERS = (1, 2, 3)
"""deflate, shuffle, fletcher32: others would be loaded as plug-ins."""


@dataclass
class KerasFile:
    """Tensors by torch's names for recurrent cells, by their own for the rest."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    hints: dict[str, ModuleHint] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    # layer and direction -> (kind, {"kernel": path in the file, ...}, bias rows)
    parts: dict[tuple[str, str], tuple[str, dict[str, str], int]] = field(default_factory=dict)
    stored: dict[str, LazyTensor] = field(default_factory=dict)  # the same tensors as the file has them, by path


@dataclass
class _Cell:
    kind: str | None
    layer: str
    title: str  # the layer's name in the configuration
    backward: bool
    parts: dict[str, LazyTensor]
    paths: dict[str, str]
    stacked: bool = False


@dataclass(frozen=True)
class _Settings:
    """What a configuration says of a recurrent layer.

    reason: why torch has no such layer, None if it has; backward: name of a Bidirectional's second layer.
    """

    kind: str | None
    options: dict[str, Any]
    reason: str | None = None
    backward: str = ""


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
        version = _version(file)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"its HDF5 structure is damaged ({type(error).__name__})", path) from error
    found = KerasFile()
    layers: dict[str, _Settings] | None = None
    if config is not None:
        layers = {}
        for name, settings in _configured(config, 0, version):
            twice = layers.get(name, settings) != settings
            reason = "the configuration has several layers of this name" if twice else settings.reason
            layers[name] = replace(settings, reason=reason)
    left = dict(datasets)
    named = set()
    masked = _masks(config)
    for cell in _cells(datasets, names, layers or {}):
        for part in cell.paths.values():
            left.pop(part)
        settings = _settings_of(cell, layers, version)
        named.add(cell.title)
        _add(cell, settings, found)
        if layers is None and cell.layer not in found.skipped:
            found.assumed[cell.layer] = f"{ASSUMED[settings.kind or 'rnn']} (the file has no settings of it)"
        granted = [text for key, text in LEFT.items() if settings.options.get(key)] or [MASKED] * masked
        if granted and cell.layer not in found.skipped:
            found.assumed[cell.layer] = "; ".join(granted)
    found.tensors.update(left)
    for name, settings in (layers or {}).items():
        if name not in named and "" not in named:  # without a name: a file of an early Keras 3
            found.skipped[name] = settings.reason or "its weights were not found in the file"
    return found


def _masks(config: Any) -> bool:
    """Whether a configuration, which `parse_json` has found not too deep, has a layer that masks steps."""
    if isinstance(config, list):
        return any(map(_masks, config))
    own = isinstance(config, dict) and (config.get("class_name") == "Masking" or config.get("mask_zero") is True)
    return own or (isinstance(config, dict) and any(map(_masks, config.values())))


def _version(file: Any) -> tuple[int, ...]:
    """Keras's version, (3,) if the file does not say it."""
    for place in (file, file.get("model_weights")):
        text = place.attrs.get("keras_version", "") if place is not None else ""
        if found := re.match(r"(\d{1,4})\.(\d{1,4})", text.decode() if isinstance(text, bytes) else str(text)):
            return int(found[1]), int(found[2])
    return (3,)


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
    layer = re.sub(r"/cell(/cells/[^/]+)?/vars$", "", parent)
    return [p for p in (parent, f"{layer}/vars", f"{layer.rpartition('/')[0]}/vars") if p]


def _vars_name(file: Any, group: str) -> str:
    """The `name` attribute that Keras 3 gives the group of a layer's variables."""
    attribute = file[group].attrs.get("name", "") if group in file else ""
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)


def _cells(datasets: dict[str, LazyTensor], names: dict[str, str], layers: dict[str, _Settings]) -> Iterator[_Cell]:
    groups: dict[str, dict[str, str]] = {}
    for name in datasets:
        parent, _, leaf = name.rpartition("/")
        groups.setdefault(parent, {})[leaf.removesuffix(":0")] = name
    second = {settings.backward for settings in layers.values()} - {""}
    for parent, leaves in groups.items():
        if match := re.fullmatch(r"(.*)/cell(/cells/[^/]+)?/vars", parent):  # Keras 3
            short = {"0": "kernel", "1": "recurrent", "2": "bias"}
            group, stacked = match[1], match[2] is not None
            backward, cell = group.endswith("/backward_layer"), names[parent]
            group = re.sub(r"/(forward|backward)_layer$", "", group)
            layer, title = group.removeprefix("layers/").replace("/layers/", "/"), names.get(f"{group}/vars", "")
        elif "recurrent_kernel" in leaves:  # Keras 2
            short = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
            pieces = parent.removeprefix("model_weights/").split("/")
            cell, stacked = pieces[-1], any(piece.startswith("stacked_rnn_cells") for piece in pieces)
            backward = any(piece.startswith("backward_") or piece in second for piece in pieces[1:])
            inner = re.compile(rf"({'|'.join(CELLS)}|stacked_rnn_cells|forward_|backward_)")
            around = [piece for piece in pieces[1:] if not inner.match(piece) and piece not in second]
            title = next((piece for piece in reversed(pieces) if piece in layers), around[-1] if around else pieces[0])
            layer = title if title == pieces[0] else f"{pieces[0]}/{title}"
        else:
            continue
        paths = {part: leaves[leaf] for leaf, part in short.items() if leaf in leaves}
        parts = {part: datasets[name] for part, name in paths.items()}
        kind = _kind(cell, parts)
        yield _Cell(kind, layer.replace("/", "."), title, backward, parts, paths, stacked)


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


def _configured(config: Any, depth: int, version: tuple[int, ...]) -> Iterator[tuple[str, _Settings]]:
    """(layer name, what it says) for every recurrent layer in a model's configuration."""
    if depth > limits.DEPTH:
        return
    if isinstance(config, dict):
        settings = _describe(config, version)
        if settings is not None:
            yield str(config["config"].get("name")), settings
            return
        for value in config.values():
            yield from _configured(value, depth + 1, version)
    elif isinstance(config, list):
        for value in config:
            yield from _configured(value, depth + 1, version)


def _describe(node: Any, version: tuple[int, ...]) -> _Settings | None:
    """What the configuration of one layer says; None for layers that are not recurrent."""
    cls, config = (node.get("class_name"), node.get("config")) if isinstance(node, dict) else (None, None)
    if not isinstance(cls, str) or not isinstance(config, dict):
        return None
    if ">" in str(node.get("registered_name")) and (cls in CLASSES or cls in CUDNN or cls in ("RNN", "Bidirectional")):
        return _Settings(None, config, f"it is a class of the user's own ({str(node['registered_name'])[:80]})")
    if cls in CLASSES:
        return _Settings(CLASSES[cls], config, _unlike_torch(CLASSES[cls], config, version))
    if cls in CUDNN:
        return _Settings(CUDNN[cls], config, f"it is a {cls}, whose weights are stored in another layout")
    if cls == "RNN":
        cell: Any = config.get("cell")
        name = cell.get("class_name") if isinstance(cell, dict) else None
        if name not in CELL_CLASSES or not isinstance(cell.get("config"), dict):
            return _Settings(None, config, f"its cell is a {str(name)[:40]}, which torch has no layer for")
        options = {**cell["config"], **{key: value for key, value in config.items() if key != "cell"}}
        return _Settings(CELL_CLASSES[name], options, _unlike_torch(CELL_CLASSES[name], options, version))
    if cls == "Bidirectional":
        return _bidirectional(config, version)
    return None


def _bidirectional(config: dict[str, Any], version: tuple[int, ...]) -> _Settings | None:
    first, second = (_describe(config.get(key), version) for key in ("layer", "backward_layer"))
    if first is None:
        return None
    reason = first.reason or _unknown({**config, "layer": None, "backward_layer": None, "merge_mode": None})
    if config.get("merge_mode", "concat") != "concat":
        reason = f"it merges its directions by {str(config['merge_mode'])[:20]}, torch concatenates them"
    if second is not None and reason is None:
        plain = replace(second, options={**second.options, "go_backwards": False})
        reason = _unlike_torch(second.kind, plain.options, version) if second.kind == first.kind else "its kinds differ"
        if not second.options.get("go_backwards"):
            reason = "its second layer runs forward"
    name = str(config["backward_layer"]["config"].get("name", "")) if second is not None else ""
    return _Settings(first.kind, first.options, reason, name)


def _unlike_torch(kind: str | None, options: dict[str, Any], version: tuple[int, ...]) -> str | None:
    """Why torch has no layer of these settings, None if it has."""
    if reason := _unknown(options):
        return reason
    if options.get("go_backwards"):
        return "it runs backwards only, which torch has no layer for"
    if kind == "gru" and options.get("reset_after") is False:
        return "it is a GRU that resets before the matmul (reset_after=False), which torch has no equivalent for"
    gates = "hard_sigmoid" if version < (2, 3) else "sigmoid"
    expected = ("tanh", "relu") if kind == "rnn" else ("tanh",)
    if options.get("activation", "tanh") not in expected:
        return "its activations are not torch's"
    if kind != "rnn" and options.get("recurrent_activation", gates) != "sigmoid":
        return "its activations are not torch's"
    return None


def _unknown(options: dict[str, Any]) -> str | None:
    """Why a layer with a setting that is neither known nor off cannot be taken for torch's; None without one."""
    unknown = sorted(key for key in options.keys() - READ - INERT - LEFT.keys() if options[key])
    return f"its setting {unknown[0][:40]!r} is one that kruify does not know" if unknown else None


def _settings_of(cell: _Cell, layers: dict[str, _Settings] | None, version: tuple[int, ...]) -> _Settings:
    """What is known of a cell's layer: its configuration, else what all of its kind agree on, else the defaults."""
    if cell.kind is None:
        return _Settings(None, {}, "its weights are not those of an LSTM, GRU or SimpleRNN")
    if layers is None:
        return _Settings(cell.kind, {}, _unlike_torch(cell.kind, {}, version))
    if cell.title in layers:
        return layers[cell.title]
    others = [settings for settings in layers.values() if settings.kind == cell.kind]
    if not others:
        return _Settings(cell.kind, {}, "the configuration does not describe it")
    refused = next((settings.reason for settings in others if settings.reason), None)
    return _Settings(cell.kind, {}, refused and f"a layer of its kind cannot be read ({refused})")


def _add(cell: _Cell, settings: _Settings, found: KerasFile) -> None:
    name, suffix = cell.layer, "_l0_reverse" if cell.backward else "_l0"
    reason = _refusal(cell, settings)
    if (name, suffix) in found.parts:
        reason = "several cells in the file have its name"
    if reason:
        found.skipped.setdefault(name, reason)
        for key in [key for key in found.parts if key[0] == name]:  # its other direction
            for short in PARTS:
                found.tensors.pop(f"{name}.{short}{key[1]}", None)
            found.tensors |= {path: found.stored[path] for path in found.parts.pop(key)[1].values()}
        found.hints.pop(name, None)
    if cell.kind is None or name in found.skipped:
        found.tensors |= {path: cell.parts[part] for part, path in cell.paths.items()}
        return
    found.stored |= {path: cell.parts[part] for part, path in cell.paths.items()}
    for short, tensor in keras_cell(cell.kind, cell.parts, suffix).items():
        found.tensors[f"{name}.{short}"] = tensor
    rows = len(cell.parts["bias"].shape) if "bias" in cell.parts else 0
    found.parts[name, suffix] = (cell.kind, cell.paths, rows)
    both = cell.backward or name in found.hints
    options: dict[str, bool | int | float | str] = {
        "mode": cell.kind.upper(),
        "input_size": cell.parts["kernel"].shape[0],
        "hidden_size": cell.parts["recurrent"].shape[0],
        "num_layers": 1,
        "bias": "bias" in cell.parts,
        "bidirectional": both,
        "batch_first": settings.options.get("time_major") is not True,
    }
    if isinstance(dropout := settings.options.get("dropout"), float | int):
        options["dropout"] = float(dropout)
    if cell.kind == "rnn" and settings.options.get("activation") in ("tanh", "relu"):
        options["nonlinearity"] = settings.options["activation"]
    found.hints[name] = ModuleHint(f"keras.{cell.kind.upper()}", options)


def _refusal(cell: _Cell, settings: _Settings) -> str | None:
    """Why torch has no such layer, None if it has."""
    if cell.stacked:
        return "its cells are stacked in one layer, which torch has no layer for"
    if settings.reason or cell.kind is None:
        return settings.reason
    if settings.kind != cell.kind:
        return f"its weights are those of another kind ({cell.kind.upper()}) than its configuration"
    bias, (units, width) = cell.parts.get("bias"), cell.parts["recurrent"].shape
    for key, actual in (("units", units), ("use_bias", bias is not None)):
        if settings.options.get(key, actual) != actual:
            return f"its configuration says {key}={str(settings.options[key])[:20]}, its weights {key}={actual}"
    if bias is not None and bias.shape not in ((width,), (2, width)):
        return f"its bias has shape {list(bias.shape)}"
    if cell.kind == "gru" and bias is not None and len(bias.shape) == 1:
        return "it is a GRU that resets before the matmul (reset_after=False), which torch has no equivalent for"
    return None
