"""Read the LSTM, GRU and RNN nodes of an ONNX model; of other files only those beside it that hold its numbers.

Only what computes their weights from constants is run (`onnx_constants`). Needs `pip install kruify[onnx]`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kruify.checkpoint import limits
from kruify.checkpoint.gates import GATES, onnx_layer
from kruify.checkpoint.modules import ModuleHint
from kruify.checkpoint.onnx_cells import REASON, GateMatrices
from kruify.checkpoint.onnx_constants import Constant, Folding, lazy_tensor, outside
from kruify.checkpoint.onnx_graph import Key, Node, Proto, Scope, Walk, is_identity, own
from kruify.checkpoint.onnx_quantized import with_own_lstms
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}
INPUTS = {"W": 1, "R": 2, "B": 3}
"""Inputs that are weights -> their place."""
PEEPHOLES = 7
ACTIVATIONS = {"lstm": [["sigmoid", "tanh", "tanh"]], "gru": [["sigmoid", "tanh"]], "rnn": [["tanh"], ["relu"]]}
"""What torch's layers have, for one direction. None of these takes an alpha or beta."""
ATTRIBUTES = {
    *("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget"),
    *("layout", "linear_before_reset", "output_sequence"),
}
MATRICES = {
    **{"MatMul": (0, 1), "Gemm": (0, 1), "Einsum": (0, 1)},
    **{"Conv": (1,), "ConvTranspose": (1,), "Gather": (0,)},
}
"""Operators -> which of their inputs are weights or tables where they are constant."""
EIGHT_BIT = (2, 3)
LOOPS = ("Scan", "Loop")
Readers = dict[Key, set[tuple[Key, int]]]
_RECURRENT = re.compile("lstm|gru|rnn", re.IGNORECASE)
_TORCHS = re.compile(r"(.*\.)?weight_[ih]h", re.DOTALL)


@dataclass(frozen=True)
class Weight:
    """One input of a recurrent node, W, R or B.

    Attributes:
        constant: its numbers and where they are.
        own: whether nothing reads the tensor in the file but recurrent nodes, as this input.
    """

    node: Node
    part: str
    constant: Constant
    own: bool = True


@dataclass
class OnnxFile:
    """What was found.

    Attributes:
        tensors: by torch's names for recurrent nodes, by their own for other constants of real numbers.
        hints: layer, or matrix of a cell -> what torch would call its options.
        skipped: recurrent nodes that cannot be read, and why.
        dropped: sentences on what is read otherwise than it is stored.
        weights: layer -> "W", "R", "B" -> where they are.
        protos: other constants by the names in `tensors`.
        scopes: all graphs, and calls of functions.
        computing: nodes that compute nothing but weights of recurrent nodes.
        taken: the tensors that nothing reads but recurrent nodes and `computing`; their ids.
        outside: the files beside the model that tensors keep their numbers in.
        matrices: names in `protos` of what is but a weight of MatMul, Gemm, Einsum or Conv, or a table of Gather.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    hints: dict[str, ModuleHint] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Weight]] = field(default_factory=dict)
    protos: dict[str, Proto] = field(default_factory=dict)
    scopes: list[Scope] = field(default_factory=list)
    computing: set[Key] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)
    outside: tuple[Path, ...] = ()


def load_model(path: Path) -> Proto:
    """The parsed protobuf; LSTM nodes of onnxruntime's dynamic quantisation are ONNX's own in it.

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
    with_own_lstms(model.graph)
    return model


def read_onnx(path: Path, graph: bool = False) -> OnnxFile:
    """The weights of an ONNX model.

    Args:
        graph: as for `read_model`.

    Raises: as `load_model` and `onnx_constants.outside`.
    """
    return read_model(load_model(path), path, graph)


def read_model(model: Proto, path: Path, graph: bool = False) -> OnnxFile:
    """The weights of a parsed model, whose protobufs `OnnxFile.weights` and `OnnxFile.protos` point to.

    Args:
        graph: the recurrent nodes stay in their graph, so read those, too, that torch has no layer for: backward only,
            a GRU that resets before the matmul, peepholes, clipping, other activations; and matrices of cells that are
            written out in MatMul or Gemm, whose hint has the mode "MATRIX".
    """
    walk = Walk(model, path)
    nodes = list(walk)
    found = OnnxFile(outside=_outside(walk.scopes, path))
    size = model.ByteSize() + sum(file.stat().st_size for file in found.outside)
    folding = Folding(path, {node.key: node for node in nodes}, limits.RATIO * size + limits.SLACK)
    names: Counter[str] = Counter()
    for node in nodes:
        if is_recurrent(node.proto):
            _add_node(_unique(node.path, names), node, folding, found, graph)
        elif not own(node.proto) and _RECURRENT.search(node.proto.op_type) and walk.function(node.proto) is None:
            found.skipped[_unique(node.path, names)] = _foreign(node.proto)
    recurrent = {around.key for node in nodes if is_recurrent(node.proto) for around in node.around()}
    for node in nodes:
        if node.key not in recurrent and (reason := _without_node(node, walk)):
            found.skipped[_unique(node.path, names)] = reason
    found.scopes = walk.scopes
    readers = _mark_read(walk, nodes, found)
    places = {(node.key, at) for node in nodes if own(node.proto) for at in MATRICES.get(node.proto.op_type, ())}
    cells = GateMatrices((node for node in nodes if walk.function(node.proto) is None), folding)
    for name, proto in _constants(walk.scopes, path):
        lazy = lazy_tensor(proto, path)
        if id(proto) not in found.taken and lazy is not None and lazy.dtype.is_floating_point:
            name = _unique(name, names)
            found.tensors[name], found.protos[name] = lazy, proto
            if (read_by := readers.get((0, id(proto)), set())) and read_by <= places:
                found.matrices.add(name)
                if not _TORCHS.fullmatch(name) and cells.has(proto, read_by):
                    if graph:
                        found.hints[name] = ModuleHint("onnx.MatMul", {"mode": "MATRIX"})
                    else:
                        found.skipped[name] = REASON
    return found


def _outside(scopes: list[Scope], path: Path) -> tuple[Path, ...]:
    """The other files that tensors are in."""
    places = [
        outside(proto, path) for scope in scopes for proto in scope.values.values() if hasattr(proto, "data_type")
    ]
    return tuple(dict.fromkeys(place.file for place in places if place is not None))


def is_recurrent(proto: Proto) -> bool:
    return proto.op_type in KINDS and own(proto)


def _mark_read(walk: Walk, nodes: list[Node], found: OnnxFile) -> Readers:
    """Fills `found.computing` and `found.taken`; weights that other nodes read, too, are marked and named. Returns the
    inputs of nodes that read each value."""
    readers: Readers = {}
    for node in nodes:
        if not is_identity(node.proto) and walk.function(node.proto) is None:
            for at, name in enumerate(node.proto.input):
                if name:
                    readers.setdefault(node.scope.find(name).key, set()).add((node.key, at))
    for scope in walk.scopes:
        for value in scope.body.output:
            source = scope.find(value if isinstance(value, str) else value.name)
            readers.setdefault(source.key, set()).add(((0, 0), 0))
    weights = [(name, weight) for name, parts in found.weights.items() for weight in parts.values()]
    ours = {(weight.node.key, INPUTS[weight.part]) for _, weight in weights}
    only = {node.key: node for _, weight in weights for node in weight.constant.nodes}
    todo = list(only)
    while todo:
        key = todo.pop()
        if key in only and not all(reader in ours or reader[0] in only for reader in readers[key]):
            node = only.pop(key)
            todo += [node.scope.find(name).key for name in node.proto.input if name]
    for name, weight in weights:
        proto = weight.constant.proto
        if proto is not None and not readers[0, id(proto)] <= ours:
            found.weights[name][weight.part] = replace(weight, own=False)
            found.dropped.append(f"the {weight.part} of {name} is read by other nodes, too: they keep its numbers")
    found.computing = set(only)
    found.taken = {
        key[1]
        for key, found_readers in readers.items()
        if key[0] == 0 and all(reader in ours or reader[0] in only for reader in found_readers)
    }
    return readers


def _unique(name: str, names: Counter[str]) -> str:
    while True:
        names[name] += 1
        if names[name] == 1:
            return name
        name = f"{name}_{names[name]}"


def _constants(scopes: list[Scope], path: Path) -> Iterator[tuple[str, Proto]]:
    """Every tensor of the model once, with its name: those of the main graph by their own."""
    seen: set[int] = set()
    for scope in scopes:
        initializers = [proto.name for proto in getattr(scope.body, "initializer", ())]
        if len(set(initializers)) < len(initializers):
            twice = next(name for name, count in Counter(initializers).items() if count > 1)
            raise CorruptError(f"it has the tensor {twice[:80]} twice", path)
        for name in dict.fromkeys([*initializers, *scope.values]):
            proto = scope.values[name]
            if hasattr(proto, "data_type") and id(proto) not in seen:
                seen.add(id(proto))
                yield f"{scope.path}{name}", proto


def _add_node(name: str, node: Node, folding: Folding, found: OnnxFile, graph: bool) -> None:
    kind = KINDS[node.proto.op_type]
    attributes, inputs = node.attributes, list(node.proto.input)
    parts = {part: inputs[at] for part, at in INPUTS.items() if at < len(inputs) and inputs[at]}
    weights: dict[str, Weight] = {}
    for part, source in parts.items():
        constant = folding.constant(node.scope, source)
        if isinstance(constant, str):
            found.skipped[name] = f"its {part} {constant}"
            return
        weights[part] = Weight(node, part, constant)
    lazy = {part: weight.constant.tensor for part, weight in weights.items()}
    reason = _misfit(kind, attributes, lazy) or (None if graph else _refusal(kind, attributes, inputs, lazy))
    if reason:
        found.skipped[name] = reason
        return
    directions = lazy["W"].shape[0]
    for short, tensor in onnx_layer(kind, lazy, directions).items():
        found.tensors[f"{name}.{short}"] = tensor
    options: dict[str, bool | int | float | str] = {
        "mode": kind.upper(),
        "input_size": lazy["W"].shape[2],
        "hidden_size": lazy["R"].shape[2],
        "num_layers": 1,
        "bias": "B" in lazy,
        "bidirectional": directions == 2,
        "batch_first": "layout" in attributes and attributes["layout"].i == 1,
        "dropout": 0.0,
    }
    if kind == "rnn":
        named = (_activations(attributes) or ["tanh"])[0]
        options["nonlinearity"] = named if [named] in ACTIVATIONS[kind] else "tanh"
    found.hints[name] = ModuleHint(f"onnx.{node.proto.op_type}", options)
    found.weights[name] = weights
    if any(leaf.made_by.data_type in EIGHT_BIT for w in weights.values() for leaf in w.constant.leaves):
        found.dropped.append(f"the 8-bit weights of {name} are read as {str(lazy['W'].dtype).removeprefix('torch.')}")


def _activations(attributes: dict[str, Proto]) -> list[str]:
    if "activations" not in attributes:
        return []
    return [text.decode("ascii", "replace").lower() for text in attributes["activations"].strings]


def _misfit(kind: str, attributes: dict[str, Proto], lazy: dict[str, LazyTensor]) -> str | None:
    """Why the weights are none of such a node, None if they are."""
    if not {"W", "R"} <= set(lazy):
        return "it has no weights"
    if unknown := sorted(set(attributes) - ATTRIBUTES):
        return f"its attribute {unknown[0][:80]} is none of ONNX's"
    w, r = lazy["W"].shape, lazy["R"].shape
    gates = GATES[kind]
    if len(w) != 3 or len(r) != 3 or w[0] != r[0] or w[0] not in (1, 2) or r[1] != gates * r[2] or w[1] != r[1]:
        return f"its weights have shapes {list(w)} and {list(r)}, which do not fit together"
    if "B" in lazy and lazy["B"].shape != (w[0], 2 * w[1]):
        return f"its bias has shape {list(lazy['B'].shape)}"
    if len({tensor.dtype for tensor in lazy.values()}) > 1:
        return "its weights are of several data types"
    if "hidden_size" in attributes and attributes["hidden_size"].i != r[2]:
        return f"its hidden_size is {attributes['hidden_size'].i}, that of its weights {r[2]}"
    direction = _direction(attributes)
    if direction not in (("forward", "reverse"), ("bidirectional",))[w[0] - 1]:
        return f"its direction ({direction[:40]}) does not match its weights"
    return None


def _direction(attributes: dict[str, Proto]) -> str:
    return str(attributes["direction"].s.decode("ascii", "replace")) if "direction" in attributes else "forward"


def not_in_torch(weights: Mapping[str, Weight]) -> str | None:
    """Why torch has no layer like a recurrent node, None if it has; by the node's "W", "R" and "B"."""
    node = weights["W"].node
    lazy = {part: weight.constant.tensor for part, weight in weights.items()}
    return _refusal(KINDS[node.proto.op_type], node.attributes, list(node.proto.input), lazy)


def _refusal(kind: str, attributes: dict[str, Proto], inputs: list[str], lazy: dict[str, LazyTensor]) -> str | None:
    """Why torch has no such layer, None if it has."""
    if _direction(attributes) == "reverse":
        return "it runs backwards only, which torch has no layer for"
    if "layout" in attributes and attributes["layout"].i not in (0, 1):
        return f"its layout is {attributes['layout'].i}, which ONNX does not define"
    if kind == "gru" and not ("linear_before_reset" in attributes and attributes["linear_before_reset"].i):
        return "it is a GRU that resets before the matmul (linear_before_reset=0), which torch has no equivalent for"
    return unlike_torch(kind, attributes, inputs, lazy["W"].shape[0])


def unlike_torch(kind: str, attributes: dict[str, Proto], inputs: list[str], directions: int) -> str | None:
    """Why a step of a node is none that torch has, None if it is; how a GRU resets does not matter."""
    if len(inputs) > PEEPHOLES and inputs[PEEPHOLES]:
        return "it has peepholes, which torch has no equivalent for"
    if "clip" in attributes or ("input_forget" in attributes and attributes["input_forget"].i):
        return "it clips its cells or couples its gates, which torch has no equivalent for"
    return _activations_unlike_torch(ACTIVATIONS[kind], _activations(attributes), directions)


def _activations_unlike_torch(known: list[list[str]], names: list[str], directions: int) -> str | None:
    """Why torch has no layer with these activations, those of the second direction after those of the first."""
    if not names or names in [one * directions for one in known]:
        return None
    size = len(known[0])
    if len(names) == 2 * size and all(names[at : at + size] in known for at in (0, size)):
        return f"its two directions have different activations ({', '.join(names)}), which torch has no layer for"
    return f"its activations ({', '.join(names)[:80]}) are not torch's"


def _foreign(proto: Proto) -> str:
    operator = f"{proto.domain}.{proto.op_type}"[:80]
    if "Quantize" in proto.op_type:
        return f"it is a {operator}, whose weights are quantised; give the model from before quantisation"
    return f"it is a {operator}: kruify reads ONNX's own LSTM, GRU and RNN nodes"


def _without_node(node: Node, walk: Walk) -> str | None:
    """Why what has no recurrent node in its body may be recurrent all the same; None for all else."""
    kind = node.proto.op_type
    if walk.function(node.proto) is not None and _RECURRENT.search(kind):
        return "it is a function of the model without an LSTM, GRU or RNN node in it"
    bodies = [attribute.g for attribute in node.attributes.values() if attribute.HasField("g")]
    if kind in LOOPS and own(node.proto) and any(map(_multiplies, bodies)):
        return f"it is a {kind} that multiplies matrices in every step: kruify reads LSTM, GRU and RNN nodes"
    return None


def _multiplies(graph: Proto) -> bool:
    return any(node.op_type in ("MatMul", "Gemm", "Einsum") for node in graph.node)
