"""Walks an ONNX model: every node in its graph, in the bodies of If, Loop and Scan, and in the calls of its functions.

Nothing is run, inlined or changed. Each node comes with its scope, which says what its input names stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kruify.checkpoint import limits
from kruify.errors import UnsafeError

DEPTH = 20
"""Nesting of bodies and calls."""
NAME = 200
"""Characters of a node's name that are used."""
SCOPE = 20
"""What a body or call costs beside its nodes and values, of limits.ENTRIES."""
Proto = Any  # onnx has no types of its own that mypy follows
Key = tuple[int, int]
"""One node in one scope; of a function's nodes there is one for every call."""


class Source(NamedTuple):
    """What a name stands for."""

    made_by: Proto  # a TensorProto, the NodeProto that computes it, or None: an input, or nothing
    scope: Scope
    name: str  # in that scope

    @property
    def is_tensor(self) -> bool:
        """Whether it is a constant as the file keeps it: an initializer, or the value of a Constant node."""
        return self.made_by is not None and hasattr(self.made_by, "data_type")

    @property
    def key(self) -> Key:
        """Equal for equal tensors, and for outputs of one node in one scope."""
        return (0 if self.is_tensor else id(self.scope), id(self.made_by))


@dataclass(eq=False)
class Scope:
    """The names that the nodes of one graph, or of one call of a function, see.

    Attributes:
        body: the GraphProto or FunctionProto.
        values: name -> the TensorProto or the NodeProto that makes it, None for an input.
        opset: version of ONNX's own operators.
        path: what the names of its nodes begin with, "" in the main graph.
        around: the node whose body it is, or that calls it.
        attribute: of that node, whose graph it is.
        outer: the scope around the body of an If, Loop or Scan, whose names are seen in it.
        bound: inputs of a function -> what the call passes.
        attributes: of the call, which the function's nodes refer to.
    """

    body: Proto
    values: dict[str, Proto]
    opset: int
    path: str = ""
    around: Node | None = None
    attribute: str = ""
    outer: Scope | None = None
    bound: dict[str, Source] = field(default_factory=dict)
    attributes: dict[str, Proto] = field(default_factory=dict)
    known: dict[str, Source] = field(default_factory=dict)

    @property
    def root(self) -> Scope:
        """The main graph, or the call of a function, that it stands in."""
        scope = self
        while scope.outer is not None:
            scope = scope.outer
        return scope

    def find(self, name: str) -> Source:
        """What a name stands for, seen through Identity nodes, calls of functions and bodies."""
        passed: dict[tuple[int, str], Scope] = {}
        scope: Scope = self
        while True:
            if name in scope.known:
                found = scope.known[name]
                break
            if (id(scope), name) in passed:  # Identity nodes in a circle
                found = Source(None, scope, name)
                break
            passed[id(scope), name] = scope
            made_by: Proto = scope.values.get(name)
            if name in scope.bound:
                found = scope.bound[name]
                break
            if name not in scope.values and scope.outer is not None:
                scope = scope.outer
            elif is_identity(made_by):
                name = made_by.input[0]
            else:
                found = Source(made_by, scope, name)
                break
        for (_, name), scope in passed.items():
            scope.known[name] = found
        return found


class Node(NamedTuple):
    """One node where it stands."""

    proto: Proto
    scope: Scope
    place: int  # in its graph
    attributes: dict[str, Proto]  # those of functions' calls in the place of references

    @property
    def key(self) -> Key:
        return (id(self.scope), id(self.proto))

    @property
    def own_name(self) -> str:
        """Its name, or one by its place."""
        name = self.proto.name.strip("/").replace("/", ".") or f"{self.proto.op_type.lower()}_{self.place}"
        return name[:NAME]

    @property
    def path(self) -> str:
        """Its name, after those of the nodes around it."""
        return f"{self.scope.path}{self.own_name}"

    def around(self) -> Iterator[Node]:
        """The nodes whose bodies it stands in, the innermost first."""
        node = self.scope.around
        while node is not None:
            yield node
            node = node.scope.around


def own(proto: Proto) -> bool:
    """Whether a node's operator is ONNX's own."""
    return proto.domain in ("", "ai.onnx")


def is_identity(proto: Proto) -> bool:
    """Whether a node hands on its input."""
    return getattr(proto, "op_type", "") == "Identity" and own(proto) and bool(proto.input)


class Walk:
    """The nodes of a model, in order; the body of a node follows the node."""

    def __init__(self, model: Proto, path: Path) -> None:
        self.model, self.path = model, path
        self.functions = {(f.domain, f.name, getattr(f, "overload", "")): f for f in model.functions}
        self.scopes: list[Scope] = []
        self._tables: dict[int, tuple[Proto, dict[str, Proto]]] = {}  # the proto is kept, so that its id stays its own
        self._left = limits.ENTRIES

    def __iter__(self) -> Iterator[Node]:
        self.scopes.clear()
        graph = self.model.graph
        return self._visit(Scope(graph, self._table(graph), _opset(self.model)), 0)

    def function(self, proto: Proto) -> Proto | None:
        """The function of the model that a node calls."""
        return self.functions.get((proto.domain, proto.op_type, getattr(proto, "overload", "")))

    def _visit(self, scope: Scope, depth: int) -> Iterator[Node]:
        self.scopes.append(scope)
        if depth > DEPTH:
            raise UnsafeError("its graphs are nested too deeply", self.path)
        self._left -= SCOPE + len(scope.body.node) + len(scope.values)
        if self._left < 0:
            raise UnsafeError("its graph has too many nodes", self.path)
        for place, proto in enumerate(scope.body.node):
            node = Node(proto, scope, place, dict(_attributes(proto, scope)))
            yield node
            function = self.function(proto)
            if function is not None:
                yield from self._visit(self._called(function, node), depth + 1)
            for attribute in node.attributes.values():
                for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                    path = f"{node.path}.{attribute.name[:NAME]}."
                    inside = Scope(
                        body, self._table(body), scope.opset, path, node, attribute.name, scope,
                        attributes=scope.attributes,
                    )  # fmt: skip
                    yield from self._visit(inside, depth + 1)

    def _called(self, function: Proto, node: Node) -> Scope:
        given = zip(function.input, node.proto.input, strict=False)
        bound = {name: node.scope.find(passed) for name, passed in given if passed}
        attributes = {a.name: a for a in getattr(function, "attribute_proto", ())} | node.attributes
        opset = _opset(function) or node.scope.opset
        return Scope(function, self._table(function), opset, f"{node.path}.", node, bound=bound, attributes=attributes)

    def _table(self, body: Proto) -> dict[str, Proto]:
        """Names that a graph or function defines -> the tensor, or the node that computes it, None for an input."""
        if id(body) not in self._tables:
            table: dict[str, Proto] = {value if isinstance(value, str) else value.name: None for value in body.input}
            for proto in body.node:
                value = next((a.t for a in proto.attribute if a.name == "value" and a.HasField("t")), None)
                constant = value if proto.op_type == "Constant" and own(proto) and value is not None else proto
                table |= dict.fromkeys(proto.output, constant)
            table |= {proto.name: proto for proto in getattr(body, "initializer", ())}
            self._tables[id(body)] = (body, table)
        return self._tables[id(body)][1]


def _opset(body: Proto) -> int:
    return next((entry.version for entry in body.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _attributes(proto: Proto, scope: Scope) -> Iterator[tuple[str, Proto]]:
    for attribute in proto.attribute:
        if not attribute.ref_attr_name:
            yield attribute.name, attribute
        elif attribute.ref_attr_name in scope.attributes:
            copy = type(attribute)()
            copy.CopyFrom(scope.attributes[attribute.ref_attr_name])
            copy.name = attribute.name
            yield attribute.name, copy
