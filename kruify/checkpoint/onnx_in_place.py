"""A copy of an ONNX model with other weights: nodes, names and metadata stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from kruify.checkpoint.file_bytes import chunks, read_at
from kruify.checkpoint.gates import ONNX_PARTS, onnx_from_torch
from kruify.checkpoint.in_place import check_fits
from kruify.checkpoint.onnx_constants import EXTERNAL, Outside, outside, tensor_proto
from kruify.checkpoint.onnx_file import INPUTS, OnnxFile, Weight, load_model, read_model
from kruify.checkpoint.onnx_graph import Node, Proto, Scope
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import as_bytes, atomic_file
from kruify.errors import UnsupportedError

DATA = ".data"
"""What follows the name of a model in that of the file with its other numbers."""
MOST = 2**31 - 1
"""Bytes of a model's own file: protobuf's limit."""
PAGE = 4096
"""Numbers of a page or more begin at a multiple of it in a file of their own: a runtime can map them."""
ALIGNED = 64
"""Where fewer begin."""


@dataclass
class Made:
    """What computes a value: constants, and the nodes that make it of them, in order. No nodes: the first constant."""

    constants: list[Proto] = field(default_factory=list)
    nodes: list[Proto] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """What a weight becomes.

    Attributes:
        key: equal for what is equal.
        make: (name, opset, fresh) -> what computes a value of that name, in the shape and dtype that the weight has;
            `fresh` gives other names (`OnnxCopy.fresh`).
    """

    key: Hashable
    make: Callable[[str, int, Callable[[str], str]], Made]


class OnnxCopy:
    """A parsed ONNX model whose weights are replaced; everything else stays as it is."""

    def __init__(self, source: Path, graph: bool = False) -> None:
        """Args: graph: as for `onnx_file.read_model`."""
        self.source = source
        self.model = load_model(source)
        self.found: OnnxFile = read_model(self.model, source, graph)
        self._names = Counter(name for scope in self.found.scopes for name in scope.values)
        self._homes = {id(proto): (scope, name) for scope, name, proto in self._tensors()}
        self._candidates = [(scope, self._unneeded(scope)) for scope in self.found.scopes]

    def fresh(self, name: str) -> str:
        """A name that no value of the model has."""
        number = self._names[name]
        self._names[name] += 1
        return self.fresh(f"{name}_{number}") if number else name

    def home(self, proto: Proto) -> tuple[Scope, str]:
        """The graph that a constant of the file stands in, and its name there."""
        return self._homes[id(proto)]

    def groups(self) -> list[list[tuple[str, Weight]]]:
        """The weights of recurrent nodes with the names of their layers, those that are one tensor together."""
        groups: dict[Hashable, list[tuple[str, Weight]]] = {}
        for layer, weights in self.found.weights.items():
            for weight in weights.values():
                groups.setdefault(weight.constant.tensor.identity, []).append((layer, weight))
        return list(groups.values())

    def replace_weights(self, group: Sequence[tuple[Weight, Content]]) -> None:
        """Gives weights that were one tensor new contents.

        A weight that only recurrent nodes read stands where the old one stood, under its name. Where the graph
        computes it, other nodes read it, or weights that were one come apart, the nodes read new values.

        Raises:
            UnsupportedError: a node needs a new value and stands in a function that is called several times.
        """
        weight, content = group[0]
        if weight.constant.proto is not None and weight.own and all(other.key == content.key for _, other in group):
            self.replace(weight.constant.proto, content)
            return
        made: dict[tuple[int, Hashable], str] = {}
        for weight, content in group:
            root = self._root(weight)
            self._name_nodes()
            if (id(root), content.key) not in made:
                name = self.fresh(f"{weight.node.path}.{weight.part}")
                self._insert(root.body, content.make(name, root.opset, self.fresh), root.around is None)
                made[id(root), content.key] = name
            weight.node.proto.input[INPUTS[weight.part]] = made[id(root), content.key]

    def replace(self, proto: Proto, content: Content) -> None:
        """Gives a constant of the file, under its name, another content."""
        scope, name = self.home(proto)
        made = content.make(name, scope.opset, self.fresh)
        if not made.nodes:
            kept = proto.name
            proto.CopyFrom(made.constants[0])
            proto.name = kept
            return
        body = scope.body
        for held in [body.initializer, body.input] if hasattr(body, "initializer") else []:
            _drop_named(held, {name})
        _drop_nodes(body, {name})
        self._insert(body, made, scope.around is None)

    def replace_node(self, node: Node, made: Made) -> None:
        """Puts other nodes in the place of one that stands in a graph, and constants beside them."""
        body = node.scope.body
        at = next(at for at, proto in enumerate(body.node) if proto is node.proto)
        self._name_nodes()
        del body.node[at]
        self._insert(body, made, body is self.model.graph, at)

    def _name_nodes(self) -> None:
        """Nodes without a name are read by the name of their place, which is about to change."""
        for weights in self.found.weights.values():
            node = weights["W"].node
            for one in (node, *node.around()):
                one.proto.name = one.proto.name or one.own_name

    def drop_unread(self) -> None:
        """Takes out what computed nothing but weights, and constants that only it read, where nothing reads it now."""
        gone = 1
        while gone:
            gone, read = 0, set(self._read())
            for scope, names in self._candidates:
                body, unread = scope.body, names - read
                for held in ("initializer", "input", "value_info") if hasattr(body, "initializer") else ():
                    gone += _drop_named(getattr(body, held), unread)
                gone += _drop_nodes(body, unread)

    def save(self, target: Path, *, one_file: bool = False) -> None:
        """Writes the model; numbers that stood in other files go to `target` with .data behind its name.

        Args:
            one_file: put all numbers into the model's own file.

        Where the model's own file would take more than `MOST`, its large constants stand beside it, too.

        Raises:
            UnsupportedError: with `one_file` the model would take more than that.
        """
        kept = self.outside()
        if one_file:
            for proto, place in kept:
                with place.file.open("rb") as held:
                    proto.raw_data = bytes(read_at(place.file, held, place.start, place.length))
                proto.ClearField("external_data")
                proto.ClearField("data_location")
        own = [] if one_file or self.model.ByteSize() <= MOST else self._large()
        if own or (kept and not one_file):
            data = target.with_name(target.name + DATA)
            with atomic_file(data) as file:
                starts = starts_of(place for _, place in kept)
                for place, start in starts.items():
                    file.write(bytes(start - file.tell()))
                    with place.file.open("rb") as held:
                        held.seek(place.start)
                        file.writelines(chunks(held, place.length))
                for proto, place in kept:
                    _refer(proto, data.name, starts[place], place.length)
                for proto in own:
                    file.write(bytes(_padding(file.tell(), len(proto.raw_data))))
                    start, length = file.tell(), file.write(proto.raw_data)
                    proto.ClearField("raw_data")
                    _refer(proto, data.name, start, length)
        if self.model.ByteSize() > MOST:
            raise UnsupportedError(
                "it would take more than 2 GiB", target, "Keep more of it outside of the model's file"
            )
        with atomic_file(target) as file:
            file.write(self.model.SerializeToString(deterministic=True))

    def outside(self) -> list[tuple[Proto, Outside]]:
        """The tensors whose numbers stand in other files, and where."""
        return [(proto, place) for proto in self._held() if (place := outside(proto, self.source)) is not None]

    def _large(self) -> list[Proto]:
        """Initializers with numbers of their own that take a page or more."""
        bodies = (scope.body for scope in self.found.scopes)
        held = {id(proto): proto for body in bodies for proto in getattr(body, "initializer", ())}
        return [proto for proto in held.values() if len(proto.raw_data) >= PAGE]

    def _held(self) -> Iterator[Proto]:
        """Every tensor of every graph, once."""
        seen: dict[int, Proto] = {}
        for scope in self.found.scopes:
            for proto in getattr(scope.body, "initializer", ()):
                seen[id(proto)] = proto
            for node in scope.body.node:
                for attribute in node.attribute:
                    for proto in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                        seen[id(proto)] = proto
        return iter(list(seen.values()))

    def _tensors(self) -> Iterator[tuple[Scope, str, Proto]]:
        for scope in self.found.scopes:
            for name, proto in scope.values.items():
                if hasattr(proto, "data_type"):
                    yield scope, name, proto

    def _unneeded(self, scope: Scope) -> set[str]:
        """Names of a graph whose values only weights of recurrent nodes are made of."""

        def only_weights(name: str) -> bool:
            source = scope.find(name)
            return source.key in self.found.computing or (source.is_tensor and id(source.made_by) in self.found.taken)

        return {name for name in scope.values if scope.values[name] is not None and only_weights(name)}

    def _read(self) -> Iterator[str]:
        """Every name that a node of any graph reads, or that a graph gives."""
        for scope in self.found.scopes:
            for value in scope.body.output:
                yield value if isinstance(value, str) else value.name
            for node in scope.body.node:
                yield from node.input

    def _root(self, weight: Weight) -> Scope:
        """The main graph, or the call of a function, that a node stands in."""
        scope: Scope = weight.node.scope.root
        if scope.around is not None and sum(other.body is scope.body for other in self.found.scopes) > 1:
            raise UnsupportedError(
                f"the {weight.part} of {weight.node.path} is computed in a function that is called several times",
                self.source,
                "Write .pt or .safetensors",
            )
        return scope

    def _insert(self, body: Proto, made: Made, main: bool, at: int = 0) -> None:
        """Adds constants and nodes to a graph or function, before the node at a place."""
        from onnx import helper

        nodes = list(made.nodes)
        if hasattr(body, "initializer"):
            body.initializer.extend(made.constants)
            if main and self.model.ir_version < 4:  # initializers had to be inputs, too
                body.input.extend(
                    helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims))
                    for proto in made.constants
                )
        else:
            nodes[:0] = [helper.make_node("Constant", [], [proto.name], value=proto) for proto in made.constants]
        for node in reversed(nodes):
            body.node.insert(at, node)


def starts_of(places: Iterable[Outside]) -> dict[Outside, int]:
    """Where the numbers of tensors begin in the file that `OnnxCopy.save` writes beside the model."""
    starts: dict[Outside, int] = {}
    end = 0
    for place in places:
        if place not in starts:
            starts[place] = end + _padding(end, place.length)
            end = starts[place] + place.length
    return starts


def _padding(at: int, length: int) -> int:
    """Bytes between `at` and where so many bytes may begin."""
    return -at % (PAGE if length >= PAGE else ALIGNED)


def _refer(proto: Proto, location: str, start: int, length: int) -> None:
    """Says in which file the numbers of a tensor stand, and where."""
    del proto.external_data[:]
    for key, value in (("location", location), ("offset", start), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    proto.data_location = EXTERNAL


def _drop_named(held: Proto, names: Container[str]) -> int:
    """Takes entries with these names out of a repeated field; returns how many."""
    places = [at for at, one in enumerate(held) if one.name in names]
    for at in reversed(places):
        del held[at]
    return len(places)


def _drop_nodes(body: Proto, names: Container[str]) -> int:
    """Takes nodes that make nothing but these values out of a graph; returns how many."""
    made = [[name for name in node.output if name] for node in body.node]
    places = [at for at, outputs in enumerate(made) if outputs and all(name in names for name in outputs)]
    for at in reversed(places):
        del body.node[at]
    return len(places)


def replace_in_onnx(source: Path, target: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Copy an ONNX model with other weights, given by the names of its reader.

    Raises:
        UsageError: a tensor does not fit.
        UnsupportedError: as `OnnxCopy.replace_weights`.
    """
    copy = OnnxCopy(source)
    check_fits(source, copy.found.tensors, tensors)
    for name, proto in copy.found.protos.items():
        if name in tensors:
            copy.replace(proto, dense(tensors[name].load()))
    values = {**copy.found.tensors, **tensors}
    for group in copy.groups():
        copy.replace_weights(
            [(weight, dense(dense_weight(copy.found, layer, weight, values))) for layer, weight in group]
        )
    copy.drop_unread()
    copy.save(target, one_file=True)


def dense(value: Tensor) -> Content:
    """A content that is a constant."""
    key = (tuple(value.shape), value.dtype, bytes(as_bytes(value).numpy()))
    return Content(key, lambda name, *_: Made([tensor_proto(value, name)]))


def dense_weight(found: OnnxFile, layer: str, weight: Weight, tensors: Mapping[str, LazyTensor]) -> Tensor:
    """The W, R or B of a recurrent node from torch's tensors."""
    options = found.hints[layer].options
    dot = f"{layer}."
    short = {
        name.removeprefix(dot): tensors[name].load()
        for name in tensors
        if name.startswith(tuple(dot + stem for stem in ONNX_PARTS[weight.part]))
    }
    return onnx_from_torch(str(options["mode"]).lower(), weight.part, short, 1 + bool(options["bidirectional"]))
