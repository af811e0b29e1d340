"""Tensors that an ONNX graph computes from constants alone (a Concat of gates, a DequantizeLinear), as tensors.

The nodes between are evaluated by onnx.reference or onnxruntime, after onnx's shape inference has said how much they
ask for.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kruify.checkpoint.file_bytes import read_at
from kruify.checkpoint.onnx_graph import Node, Proto, Scope, Source
from kruify.checkpoint.onnx_session import cpu_session
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import tensor_bytes
from kruify.errors import CorruptError, UnsafeError

# onnx.TensorProto.DataType
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
EXTERNAL = 1
FOLDED = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Expand", "EyeLike", "Flatten"),
    *("Gather", "Identity", "Pad", "QuantizeLinear", "Reshape", "ScatterND", "Shape", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze", "Add", "CumSum", "Div", "MatMul", "Mul", "Neg", "Pow", "ReduceL2"),
    *("ReduceSum", "Sqrt", "Sub"),
}
"""Operators that are evaluated: their cost follows from the shapes."""
IR_VERSION = 8
SHAPES = 64
"""Integer constants up to this size may be shapes and axes, which shape inference has to see."""


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the inputs of the graph.

    Attributes:
        tensor: its numbers; computed tensors of equal numbers have one identity, however they are computed.
        proto: where the file keeps it as it is; None if it is computed.
        nodes: what computes it, in order.
        leaves: what it is computed from.
    """

    tensor: LazyTensor
    proto: Proto | None
    nodes: tuple[Node, ...] = ()
    leaves: tuple[Source, ...] = ()


@dataclass
class Folding:
    """Finds and evaluates constants, with a bound on the work for one file.

    Attributes:
        nodes: of all nodes of the model, by what they make (`Node.key`).
        bytes_left, nodes_left: what may still be asked for.
    """

    path: Path
    nodes: dict[Hashable, Node]
    bytes_left: int
    nodes_left: int = 20_000
    _done: dict[Hashable, Constant | str] = field(default_factory=dict)
    _tensors: dict[Hashable, LazyTensor] = field(default_factory=dict)

    def constant(self, scope: Scope, name: str) -> Constant | str:
        """The constant that a name stands for, or why it is none: "is an input of the graph"."""
        source = scope.find(name)
        if source.is_tensor:
            lazy = lazy_tensor(source.made_by, self.path)
            return "has a data type that kruify does not read" if lazy is None else Constant(lazy, source.made_by)
        key = (*source.key, source.name)
        if key not in self._done:
            traced = self._traced(source)
            self._done[key] = traced if isinstance(traced, str) else self._evaluated(source, *traced)
        return self._done[key]

    def _traced(self, source: Source) -> tuple[list[Node], list[Source]] | str:
        """The nodes that compute a value, in order, and the tensors they begin with."""
        nodes: dict[Hashable, Node] = {}
        leaves: dict[Hashable, Source] = {}
        begun: set[Hashable] = set()
        todo: list[tuple[Source, bool]] = [(source, False)]
        while todo:
            found, entered = todo.pop()
            if found.is_tensor:
                leaves[found.key] = found
                continue
            if found.made_by is None:
                return f"is not constant: it depends on the input {found.name[:80]}"
            node = self.nodes.get(found.key)
            kind = found.made_by.op_type
            if node is None or found.made_by.domain not in ("", "ai.onnx") or kind not in FOLDED:
                return f"is computed in the graph by {kind[:40]}"
            if entered:
                nodes[found.key] = node
            elif found.key not in nodes:
                if found.key in begun:
                    return "is computed from itself"
                begun.add(found.key)
                self.nodes_left -= 1
                if self.nodes_left < 0:
                    return "is computed by more nodes than kruify follows"
                todo.append((found, True))
                inputs = [found.scope.find(name) for name in found.made_by.input if name]
                todo += [(input, False) for input in reversed(inputs)]
        return list(nodes.values()), list(leaves.values())

    def _evaluated(self, source: Source, nodes: list[Node], leaves: list[Source]) -> Constant | str:
        import onnx

        inside = [a for node in nodes for a in node.attributes.values()]
        tensors = [leaf.made_by for leaf in leaves] + [a.t for a in inside if a.HasField("t")]
        if any(a.HasField("sparse_tensor") for a in inside) or None in [lazy_tensor(t, self.path) for t in tensors]:
            return "is computed from a data type that kruify does not read"
        opsets = {node.scope.opset for node in nodes}
        if len(opsets) > 1:
            return "is computed by functions of several opsets"
        if any(a.t.data_location == EXTERNAL for a in inside):
            return "is computed from an attribute whose numbers stand in another file"
        graph, feed = _graph(source, nodes, leaves, self.path)
        identity = (graph.SerializeToString(deterministic=True), *(id(leaf.made_by) for leaf in leaves))
        if identity in self._tensors:  # the same by other nodes
            return Constant(self._tensors[identity], None, tuple(nodes), tuple(leaves))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opsets.pop())])
                model.ir_version = IR_VERSION
                self._charge(model)
                tensor = _tensor(_run(model, feed))
        except UnsafeError as error:
            return error.what
        except Exception as error:  # whatever a graph that is none brings forth
            return f"is computed in a way that onnx cannot follow ({type(error).__name__})"
        numbers = (tuple(tensor.shape), tensor.dtype, hashlib.sha256(tensor_bytes(tensor)).hexdigest())
        self._tensors[identity] = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, numbers)
        return Constant(self._tensors[identity], None, tuple(nodes), tuple(leaves))

    def _charge(self, model: Proto) -> None:
        """Takes what the nodes will ask for from the budget, before any of them is run."""
        import onnx

        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        sizes = {value.name: _size(value) for value in (*inferred.input, *inferred.value_info, *inferred.output)}
        sizes |= {value.name: (tuple(value.dims), 8) for value in inferred.initializer}
        for node in inferred.node:
            for name in filter(None, node.output):
                shape, itemsize = sizes[name]
                self.bytes_left -= prod(shape) * itemsize
                if node.op_type == "MatMul":  # 16 operations cost about as much as a byte
                    self.bytes_left -= prod(shape) * sizes[node.input[0]][0][-1] // 16
        if self.bytes_left < 0:
            raise UnsafeError("is computed to a size far beyond the file's", self.path)


def _graph(source: Source, nodes: list[Node], leaves: list[Source], path: Path) -> tuple[Proto, dict[str, Any]]:
    """The nodes as a graph of their own with names of its own, and what to feed it."""
    from onnx import NodeProto, ValueInfoProto, helper, numpy_helper

    names: dict[Hashable, str] = {leaf.key: f"t{i}" for i, leaf in enumerate(leaves)}

    def label(scope: Scope, name: str) -> str:
        found = scope.find(name)
        return (
            names[found.key]
            if found.is_tensor
            else f"{names[found.key]}_{list(found.made_by.output).index(found.name)}"
        )

    copies = []
    for number, node in enumerate(nodes):
        names[node.key] = f"n{number}"
        copy = NodeProto(op_type=node.proto.op_type)
        copy.input.extend(label(node.scope, name) if name else "" for name in node.proto.input)
        copy.output.extend(f"n{number}_{i}" if name else "" for i, name in enumerate(node.proto.output))
        copy.attribute.extend(node.attributes.values())
        copies.append(copy)
    inputs, initializers, feed = [], [], {}
    for leaf in leaves:
        proto, name, lazy = leaf.made_by, names[leaf.key], lazy_tensor(leaf.made_by, path)
        assert lazy is not None  # else it would not be evaluated
        if prod(proto.dims) <= SHAPES and proto.data_type in (6, 7):
            initializers.append(tensor_proto(lazy.load(), name))
        else:
            inputs.append(helper.make_tensor_value_info(name, proto.data_type, list(proto.dims)))
            feed[name] = numpy_helper.to_array(tensor_proto(lazy.load(), name))
    output = ValueInfoProto(name=label(source.scope, source.name))
    return helper.make_graph(copies, "constant", inputs, [output], initializers), feed


def _run(model: Proto, feed: dict[str, Any]) -> Any:
    """What onnx.reference computes, or onnxruntime where that has not the version of an operator."""
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(model)
    except RuntimeError:
        return cpu_session(model.SerializeToString()).run(None, feed)[0]
    return evaluator.run(None, feed)[0]


def _size(value: Proto) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of one entry.

    Raises: KeyError, ValueError where shape inference could not tell.
    """
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        raise ValueError("shape")
    return tuple(dim.dim_value for dim in kind.shape.dim), DTYPES[kind.elem_type].itemsize


def _tensor(array: Any) -> Tensor:
    import numpy as np

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Outside(NamedTuple):
    """Where the numbers of a tensor stand outside the model's file."""

    file: Path
    start: int
    length: int


def outside(proto: Proto, path: Path) -> Outside | None:
    """Where a tensor keeps its numbers, None in the model's own file.

    Raises:
        UnsafeError: outside of the model's folder, also by a symbolic link.
        CorruptError: the file is missing, or ends before the numbers do.
    """
    if proto.data_location != EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in proto.external_data}
    place = entries.get("location", "")
    file, folder = path.parent / place, Path(os.path.realpath(path.parent))
    inside = bool(place) and "\\" not in place and "\0" not in place and ".." not in Path(place).parts
    if not inside or Path(place).is_absolute() or folder not in Path(os.path.realpath(file)).parents:
        raise UnsafeError(f"it points to numbers at {place[:80]!r}, outside of its folder", path)
    if not file.is_file():
        raise CorruptError(
            f"its numbers are to stand in {place[:80]!r}, and there is no such file", path, "Copy it, too"
        )
    numbers = [entries.get("offset") or "0", entries.get("length") or "-1"]
    if not all(re.fullmatch(r"-1|\d{1,18}", number) for number in numbers):
        raise CorruptError(f"its tensor {proto.name[:80]} has a place in {place[:80]!r} that is none", path)
    size = file.stat().st_size
    start, length = map(int, numbers)
    length = size - start if length < 0 else length
    if start < 0 or length < 0 or start + length > size:
        raise CorruptError(f"its tensor {proto.name[:80]} lies beyond the end of {place[:80]!r}", path, "Copy it again")
    return Outside(file, start, length)


def lazy_tensor(proto: Proto, path: Path) -> LazyTensor | None:
    """A tensor of the file; None for data types that torch lacks (text, 4-bit numbers).

    Raises: UnsafeError, CorruptError; also as `outside`.
    """
    place = outside(proto, path)
    shape = tuple(proto.dims)
    dtype = DTYPES.get(proto.data_type)
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise CorruptError(f"its tensor {proto.name[:80]} has a shape that is none", path)
    if dtype is None:
        return None
    numel = prod(shape)
    raw = place is not None or proto.HasField("raw_data")
    length = place.length if place is not None else len(proto.raw_data)
    typed = max(len(proto.float_data), len(proto.int32_data), len(proto.int64_data), len(proto.double_data))
    have = length // dtype.itemsize if raw else typed
    if have != numel or (raw and length % dtype.itemsize):
        raise CorruptError(f"its tensor {proto.name[:80]} of shape {list(shape)} has {have} numbers", path)
    if place is not None:
        return LazyTensor(shape, dtype, lambda: _read(place, shape, dtype), id(proto))
    return LazyTensor(shape, dtype, _loader(proto, shape, dtype), id(proto))


def _read(place: Outside, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not place.length:
        return torch.empty(shape, dtype=dtype)
    with place.file.open("rb") as file:
        return torch.frombuffer(read_at(place.file, file, place.start, place.length), dtype=dtype).reshape(shape)


def tensor_proto(tensor: Tensor, name: str) -> Proto:
    """A TensorProto of the numbers of a tensor."""
    from onnx import TensorProto

    data_type = next(number for number, dtype in DTYPES.items() if dtype == tensor.dtype)
    return TensorProto(name=name, data_type=data_type, dims=tensor.shape, raw_data=bytes(tensor_bytes(tensor)))


def _loader(proto: Proto, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
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
