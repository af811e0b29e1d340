"""Finds the matrices of recurrent cells that are written out in MatMul or Gemm, under whatever names.

x @ W, perhaps with something added or in another shape, is split into three or four equal parts, each of which reaches
a Sigmoid or Tanh: LSTM and GRU cells in a network's own code do that. Which part is which gate is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from kruify.checkpoint import limits
from kruify.checkpoint.onnx_constants import Folding
from kruify.checkpoint.onnx_graph import Key, Node, Proto, is_identity, own

GATES = (3, 4)
HANDED_ON = ("Add", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators between the product and its parts,"""
MOST = 4  # of them
ACTIVATIONS = ("Sigmoid", "Tanh")
BEFORE = (*HANDED_ON, "Mul")
"""and between a part and its activation,"""
MOST_BEFORE = 2  # of them
REASON = (
    "it is a matrix of a cell written out in MatMul or Gemm, which only 'convert MODEL.onnx -o OUT.onnx' makes small"
)
Value = tuple[Key, str]


class GateMatrices:
    """Which constants of a model are matrices of such cells; unrolled steps share theirs.

    Args:
        nodes: all of the model but calls of its functions.
    """

    def __init__(self, nodes: Iterable[Node], folding: Folding) -> None:
        self.folding, self._left = folding, limits.ENTRIES
        self._users: dict[Value, list[Node]] = {}
        self._products: dict[int, list[Node]] = {}
        for node in nodes:
            sources = [node.scope.find(name) for name in node.proto.input if name]
            for source in () if is_identity(node.proto) else dict.fromkeys((s.key, s.name) for s in sources):
                self._users.setdefault(source, []).append(node)
            multiplies = node.proto.op_type in ("MatMul", "Gemm") and own(node.proto)
            if multiplies and len(sources) > 1 and sources[1].is_tensor:
                self._products.setdefault(id(sources[1].made_by), []).append(node)

    def has(self, proto: Proto, readers: set[tuple[Key, int]]) -> bool:
        """Whether all that reads a constant multiplies with it and splits the product into gates.

        Args: readers: the inputs of nodes that read it.
        """
        products = self._products.get(id(proto), [])
        return (
            len(proto.dims) == 2
            and prod(proto.dims) > 0
            and bool(products)
            and readers == {(node.key, 1) for node in products}
            and all(self._is_split(node, proto.dims[not _transposed(node)], MOST) for node in products)
        )

    def _users_of(self, node: Node, output: str) -> list[Node]:
        users = self._users.get((node.key, output), [])
        self._left -= 1 + len(users)
        return users if self._left > 0 else []

    def _is_split(self, node: Node, width: int, further: int) -> bool:
        users = [user for user in self._users_of(node, node.proto.output[0]) if own(user.proto)]
        for gates in (n for n in GATES if width % n == 0):
            parts = [self._split(user, gates, width) for user in users if user.proto.op_type == "Split"]
            slices = [user for user in users if user.proto.op_type == "Slice"]
            for found in (*parts, self._sliced(slices, gates, width)):
                if found and all(self._is_activated(part, name, MOST_BEFORE) for part, name in found):
                    return True
        on = (user for user in users if user.proto.op_type in HANDED_ON)
        return further > 0 and any(self._is_split(user, width, further - 1) for user in on)

    def _split(self, node: Node, gates: int, width: int) -> list[tuple[Node, str]]:
        """The parts of a Split into equal ones, [] if it is another."""
        outputs = list(node.proto.output)
        sizes = self._integers(node, 1, "split") or [width // gates] * len(outputs)
        return [(node, name) for name in outputs] if sizes == [width // gates] * gates == sizes[: len(outputs)] else []

    def _sliced(self, slices: list[Node], gates: int, width: int) -> list[tuple[Node, str]]:
        """The slices that are equal parts; [] unless all parts are there."""
        each, found = width // gates, dict[int, tuple[Node, str]]()
        for node in slices:
            places = [self._integers(node, at, name) for at, name in ((1, "starts"), (2, "ends"))]
            if all(len(place) == 1 for place in places) and (self._integers(node, 4, "steps") or [1]) == [1]:
                start, end = (min(place[0] + width * (place[0] < 0), width) for place in places)
                if start % each == 0 and end == start + each:
                    found[start] = (node, node.proto.output[0])
        return list(found.values()) if len(found) == gates else []

    def _is_activated(self, node: Node, output: str, further: int) -> bool:
        users = [user for user in self._users_of(node, output) if own(user.proto)]
        if any(user.proto.op_type in ACTIVATIONS for user in users):
            return True
        on = (user for user in users if user.proto.op_type in BEFORE)
        return further > 0 and any(self._is_activated(user, user.proto.output[0], further - 1) for user in on)

    def _integers(self, node: Node, at: int, attribute: str) -> list[int]:
        """An input that is constant, or what was an attribute in older opsets; [] where it is neither."""
        if attribute in node.attributes:
            return list(node.attributes[attribute].ints)
        name = node.proto.input[at] if at < len(node.proto.input) else ""
        constant = self.folding.constant(node.scope, name) if name else ""
        if isinstance(constant, str) or constant.tensor.numel > max(GATES):
            return []
        return [int(n) for n in constant.tensor.load().flatten()]


def _transposed(node: Node) -> bool:
    return node.proto.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].i)
