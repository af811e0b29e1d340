"""Read the LSTM, GRU and RNN nodes of an ONNX model; nothing is run, nothing outside the file is opened.

Needs `pip install kruify[onnx]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.gates import GATES, onnx_layer
from kruify.checkpoint.modules import ModuleHint
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

# onnx.TensorProto.DataType
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
EXTERNAL = 1
KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}
DEFAULT_ACTIVATIONS = {"lstm": [["sigmoid", "tanh", "tanh"]], "gru": [["sigmoid", "tanh"]], "rnn": [["tanh"], ["relu"]]}


@dataclass
class OnnxFile:
    """Tensors by torch's names for recurrent nodes, by their own for the rest; hints; what cannot be read, and why."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    hints: dict[str, ModuleHint] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # layer -> {"W": initializer name, ...}
    repeats: dict[str, int] = field(default_factory=dict)  # name of a node -> how many have it


def load_model(path: Path) -> Any:
    """The parsed protobuf.

    Raises: UnsupportedError without the onnx package; CorruptError; UnsafeError beyond 2 GiB, protobuf's own limit.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedError("ONNX files need an extra", path, "Install it: pip install 'kruify[onnx]'") from error
    if path.stat().st_size > 2**31 - 1:
        raise UnsafeError("it is an ONNX file of more than 2 GiB", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # google.protobuf.message.DecodeError, a private type on some versions
        raise CorruptError("it is not a checkpoint that kruify knows", path, "Give a model file") from error
    if not (model.ir_version and model.graph.node):
        raise CorruptError("it is not a checkpoint that kruify knows", path, "Give a model file")
    return model


def read_onnx(path: Path) -> OnnxFile:
    """The weights of an ONNX model.

    Raises: as `load_model`; UnsupportedError for numbers kept outside the file, and dtypes that torch does not have.
    """
    model = load_model(path)
    found = OnnxFile()
    constants: dict[str, LazyTensor] = {}
    if len(model.graph.initializer) + len(model.graph.node) > limits.ENTRIES:
        raise UnsafeError("its graph has too many nodes", path)
    for proto in model.graph.initializer:
        if proto.name in constants:
            raise CorruptError(f"it has the tensor {proto.name[:80]} twice", path)
        constants[proto.name] = _lazy(proto, path)
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.HasField("t") and node.output:
                    constants[node.output[0]] = _lazy(attribute.t, path)
        elif node.op_type == "Identity" and node.input and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    used: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if node.op_type in KINDS and node.domain in ("", "ai.onnx"):
            used |= _add_node(node, index, constants, found)
    for proto in model.graph.initializer:
        if proto.name not in used:
            found.tensors[proto.name] = constants[proto.name]
    return found


def _add_node(node: Any, index: int, constants: dict[str, LazyTensor], found: OnnxFile) -> set[str]:
    kind = KINDS[node.op_type]
    name = node.name.strip("/").replace("/", ".") or f"{kind}_{index}"
    while name in found.hints or name in found.skipped:
        found.repeats[name] = found.repeats.get(name, 1) + 1
        name = f"{name}_{found.repeats[name]}"
    attributes = {a.name: a for a in node.attribute}
    inputs = list(node.input)
    parts = {part: inputs[at] for at, part in ((1, "W"), (2, "R"), (3, "B")) if at < len(inputs) and inputs[at]}
    lazy = {part: constants[source] for part, source in parts.items() if source in constants}
    reason = _refusal(kind, attributes, inputs, parts, lazy)
    if reason:
        found.skipped[name] = reason
        return set()
    directions = lazy["W"].shape[0]
    for short, tensor in onnx_layer(kind, lazy, directions).items():
        found.tensors[f"{name}.{short}"] = tensor
    hidden = lazy["R"].shape[2]
    options: dict[str, bool | int | float | str] = {
        "mode": kind.upper(),
        "input_size": lazy["W"].shape[2],
        "hidden_size": hidden,
        "num_layers": 1,
        "bias": "B" in lazy,
        "bidirectional": directions == 2,
        "batch_first": "layout" in attributes and attributes["layout"].i == 1,
        "dropout": 0.0,
    }
    if kind == "rnn":
        options["nonlinearity"] = _activations(attributes, 1)[0][0] if "activations" in attributes else "tanh"
    found.hints[name] = ModuleHint(f"onnx.{node.op_type}", options)
    found.parts[name] = parts
    return set(parts.values())


def _activations(attributes: dict[str, Any], directions: int) -> list[list[str]]:
    names = [text.decode("ascii", "replace").lower() for text in attributes["activations"].strings]
    size = max(1, len(names) // directions)
    return [names[i : i + size] for i in range(0, len(names), size)]


def _refusal(
    kind: str, attributes: dict[str, Any], inputs: list[str], parts: dict[str, str], lazy: dict[str, LazyTensor]
) -> str | None:
    """Why torch has no such layer, None if it has."""
    if set(parts) != set(lazy) or not {"W", "R"} <= set(lazy):
        return "its weights are computed in the graph"
    w, r = lazy["W"].shape, lazy["R"].shape
    gates = GATES[kind]
    if len(w) != 3 or len(r) != 3 or w[0] != r[0] or w[0] not in (1, 2) or r[1] != gates * r[2] or w[1] != r[1]:
        return f"its weights have shapes {list(w)} and {list(r)}, which do not fit together"
    if "B" in lazy and lazy["B"].shape != (w[0], 2 * w[1]):
        return f"its bias has shape {list(lazy['B'].shape)}"
    direction = attributes["direction"].s.decode("ascii", "replace") if "direction" in attributes else "forward"
    if direction == "reverse":
        return "it runs backwards only, which torch has no layer for"
    if (direction == "bidirectional") != (w[0] == 2):
        return "its direction does not match its weights"
    if kind == "gru" and not ("linear_before_reset" in attributes and attributes["linear_before_reset"].i):
        return "it is a GRU that resets before the matmul (linear_before_reset=0), which torch has no equivalent for"
    if len(inputs) > 7 and inputs[7]:
        return "it has peepholes, which torch has no equivalent for"
    if "clip" in attributes or ("input_forget" in attributes and attributes["input_forget"].i):
        return "it clips its cells or couples its gates, which torch has no equivalent for"
    if "activations" in attributes and any(
        names not in DEFAULT_ACTIVATIONS[kind] for names in _activations(attributes, w[0])
    ):
        return "its activations are not torch's"
    return None


def _lazy(proto: Any, path: Path) -> LazyTensor:
    if proto.data_location == EXTERNAL:
        place = next((entry.value for entry in proto.external_data if entry.key == "location"), "")
        if not place or "/" in place or "\\" in place or place in (".", ".."):
            raise UnsafeError(f"it points to numbers at {place[:80]!r}, outside of its folder", path)
        raise UnsupportedError("it keeps its numbers in other files", path, "Save it as one file")
    shape = tuple(proto.dims)
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        raise UnsupportedError(f"its tensor {proto.name[:80]} has ONNX data type {proto.data_type}", path)
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise CorruptError(f"its tensor {proto.name[:80]} has a shape that is none", path)
    numel = prod(shape)
    typed = max(len(proto.float_data), len(proto.int32_data), len(proto.int64_data), len(proto.double_data))
    have = len(proto.raw_data) // dtype.itemsize if proto.HasField("raw_data") else typed
    if have != numel or (proto.HasField("raw_data") and len(proto.raw_data) % dtype.itemsize):
        raise CorruptError(f"its tensor {proto.name[:80]} of shape {list(shape)} has {have} numbers", path)
    return LazyTensor(shape, dtype, _loader(proto, shape, dtype))


def _loader(proto: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    def load() -> Tensor:
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        if proto.HasField("raw_data"):
            return torch.frombuffer(bytearray(proto.raw_data), dtype=dtype).reshape(shape)
        if dtype in (torch.float16, torch.bfloat16):  # kept as the bits of 16-bit numbers
            bits = torch.tensor([n - 65536 if n > 32767 else n for n in proto.int32_data], dtype=torch.int16)
            return bits.view(dtype).reshape(shape)
        data = proto.float_data or proto.double_data or proto.int64_data or proto.int32_data
        return torch.tensor(list(data), dtype=dtype).reshape(shape)

    return load
