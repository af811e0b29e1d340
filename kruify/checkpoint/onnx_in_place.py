"""A copy of an ONNX model with other weights: nodes, names and metadata stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path

from torch import Tensor

from kruify.checkpoint.gates import onnx_from_torch
from kruify.checkpoint.in_place import check_fits
from kruify.checkpoint.onnx_constants import DTYPES
from kruify.checkpoint.onnx_file import INPUTS, OnnxFile, Weight, load_model, read_model
from kruify.checkpoint.onnx_graph import Proto, Scope
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import atomic_file, tensor_bytes
from kruify.errors import UnsupportedError


def replace_in_onnx(source: Path, target: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Copy an ONNX model with other weights, given by the names of its reader.

    A weight that only recurrent nodes read is written over the old one. Where the graph computes it, other nodes read
    it, or nodes that shared it come apart, the nodes get new constants, and what computed the old ones goes.

    Raises:
        UsageError: a tensor does not fit.
        UnsupportedError: a node needs a new constant and stands in a function that is called several times.
    """
    model = load_model(source)
    found = read_model(model, source)
    check_fits(source, found.tensors, tensors)
    for name, proto in found.protos.items():
        if name in tensors:
            _write(proto, tensors[name].load())
    names = Counter(name for scope in found.scopes for name in scope.values)
    written: set[int] = set()
    for group in _sharing(found, {**found.tensors, **tensors}):
        weight, value = group[0]
        proto = weight.constant.proto
        if proto is not None and weight.own and all(value.equal(other) for _, other in group):
            _write(proto, value)
            written.add(id(proto))
            continue
        made: list[tuple[Scope, Tensor, str]] = []
        for weight, value in group:
            root = _root(weight, found, source)
            name = next((name for scope, old, name in made if scope is root and old.equal(value)), "")
            if not name:
                _name_nodes(found)
                name = _new_constant(model, root, f"{weight.node.path}.{weight.part}", value, names)
                made.append((root, value, name))
            weight.node.proto.input[INPUTS[weight.part]] = name
    if not model.functions:  # whose calls may pass on what nothing reads any more
        _drop_unread(found, written)
    with atomic_file(target) as file:
        file.write(model.SerializeToString(deterministic=True))


def _sharing(found: OnnxFile, tensors: Mapping[str, LazyTensor]) -> list[list[tuple[Weight, Tensor]]]:
    """The weights of recurrent nodes with their new values, those that were one tensor together."""
    groups: dict[Hashable, list[tuple[Weight, Tensor]]] = {}
    for layer, weights in found.weights.items():
        kind, both = str(found.hints[layer].options["mode"]).lower(), found.hints[layer].options["bidirectional"]
        prefix = f"{layer}."
        shorts = [
            f"{stem}_l0{suffix}"
            for suffix in ("", "_reverse")[: 1 + bool(both)]
            for stem in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if "B" in weights else ()))
        ]
        values = onnx_from_torch(
            kind, {short: tensors[prefix + short].load() for short in shorts}, 1 + bool(both), "B" in weights
        )
        for part, value in values.items():
            groups.setdefault(weights[part].constant.tensor.identity, []).append((weights[part], value))
    return list(groups.values())


def _write(proto: Proto, value: Tensor) -> None:
    for typed in ("float_data", "int32_data", "int64_data", "double_data"):
        proto.ClearField(typed)
    proto.raw_data = bytes(tensor_bytes(value))


def _root(weight: Weight, found: OnnxFile, source: Path) -> Scope:
    """The main graph, or the call of a function, that a node stands in."""
    scope: Scope = weight.node.scope
    while scope.outer is not None:
        scope = scope.outer
    if scope.around is not None and sum(other.body is scope.body for other in found.scopes) > 1:
        raise UnsupportedError(
            f"the {weight.part} of {weight.node.path} is computed in a function that is called several times",
            source,
            "Write .pt or .safetensors",
        )
    return scope


def _name_nodes(found: OnnxFile) -> None:
    """Nodes without a name are read by the name of their place, which is about to change."""
    for weights in found.weights.values():
        node = weights["W"].node
        for one in (node, *node.around()):
            one.proto.name = one.proto.name or one.own_name


def _new_constant(model: Proto, root: Scope, name: str, value: Tensor, names: Counter[str]) -> str:
    """Adds an initializer to the main graph, or a Constant node to a function; returns its name."""
    from onnx import TensorProto, helper

    while names[name]:
        name += "_new"
    names[name] += 1
    data_type = next(number for number, dtype in DTYPES.items() if dtype == value.dtype)
    tensor = TensorProto(name=name, data_type=data_type, dims=value.shape)
    _write(tensor, value)
    if root.around is not None:
        root.body.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
        return name
    root.body.initializer.append(tensor)
    if model.ir_version < 4:  # initializers had to be inputs, too
        root.body.input.append(helper.make_tensor_value_info(name, data_type, list(value.shape)))
    return name


def _drop_unread(found: OnnxFile, written: set[int]) -> None:
    """Takes out the nodes that computed nothing but weights, and the tensors that only they read."""
    tensors = found.taken - written
    for scope in found.scopes:
        body = scope.body

        def goes(name: str, scope: Scope = scope) -> bool:
            source = scope.find(name)
            return source.key in found.computing or (source.is_tensor and id(source.made_by) in tensors)

        gone = {name for name in scope.values if scope.values[name] is not None and goes(name)}
        for field in (body.initializer, body.input, body.value_info):
            for at in reversed(range(len(field))):
                if field[at].name in gone:
                    del field[at]
        for at in reversed(range(len(body.node))):
            if body.node[at].output and all(not name or name in gone for name in body.node[at].output):
                del body.node[at]
