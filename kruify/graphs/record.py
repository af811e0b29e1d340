"""Runs an ONNX graph in onnxruntime, with what its recurrent nodes are called with beside its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kruify.checkpoint.onnx_file import OnnxFile, is_recurrent, load_model
from kruify.checkpoint.onnx_graph import Node, Proto, Walk, own
from kruify.checkpoint.onnx_session import cpu_session
from kruify.errors import UnsupportedError, UsageError, first_line
from kruify.graphs.bodies import BODIES, OPSET, handed_out
from kruify.graphs.contents import names_as_read

Feed = Mapping[str, NDArray[Any]]
"""The inputs of a graph by name: one sample."""
Arrays = dict[str, NDArray[Any]]
GIVEN = (0, 4, 5, 6)
"""Inputs of a recurrent node that are no weights: X, sequence_lens, initial_h, initial_c."""


@dataclass(frozen=True)
class NodeCall:
    """What one recurrent node is called with.

    Attributes:
        input: (time, batch, features).
        lengths: (batch,), int64.
        states: h, for an LSTM h and c, each (directions, batch, hidden); None for zeros.
    """

    input: Tensor
    lengths: Tensor
    states: tuple[Tensor | None, ...]


class Run(NamedTuple):
    """One run of a graph.

    Attributes:
        inputs: in the types of the graph.
        outputs: of the graph.
        calls: of each recorded node, by its key, in order: one where it stands in the main graph, any number where it
            stands in the body of an If or Loop.
        values: the further values that were asked for.
    """

    inputs: Arrays
    outputs: Arrays
    calls: dict[str, list[NodeCall]]
    values: Arrays


class RecordingGraph:
    """An ONNX graph, ready to run.

    Args:
        path: the model.
        nodes: keys of recurrent nodes (`recurrent_nodes`) that are to be recorded.
        values: further values of the graph that are to be recorded.
        outputs: False for a graph that is run no further than these nodes.

    Raises:
        UnsupportedError: onnxruntime is missing, or cannot run the model.
        UsageError: it has no such node.
    """

    def __init__(
        self, path: Path, nodes: Iterable[str] = (), *, values: Iterable[str] = (), outputs: bool = True
    ) -> None:
        self.path = path
        model = load_model(path)
        recorded = list(nodes)
        by_key = {key: node for node in Walk(model, path) if (key := _key(node)) is not None} if recorded else {}
        if missing := [key for key in recorded if key not in by_key]:
            raise UsageError(f"the graph has no recurrent node that gives '{missing[0]}'", path)
        if not outputs:
            del model.graph.output[:]
        self.outputs = [value.name for value in model.graph.output]
        self._values = list(values)
        self._nodes: dict[str, tuple[Proto, dict[str, str]]] = {}
        for key in recorded:
            node = by_key[key]
            read = [node.proto.input[at] for at in GIVEN if at < len(node.proto.input) and node.proto.input[at]]
            inside = node.scope.around is not None
            self._nodes[key] = node.proto, handed_out(model, node, read) if inside else {name: name for name in read}
        given = [name for _, read in self._nodes.values() for name in read.values()]
        self._further = _add_outputs(model, [*given, *self._values])
        changed = recorded or self._values or not outputs
        try:
            # as it is, the file may have nodes that load_model reads as others
            content = model.SerializeToString() if changed else path.read_bytes()
            self._session = cpu_session(content, torch.get_num_threads(), path.parent)
        except ImportError as error:
            raise UnsupportedError(
                "running an ONNX model needs an extra", path, "Install it: pip install 'kruify[onnx]'"
            ) from error
        except Exception as error:  # onnxruntime has a class of its own for every kind of failure
            raise UnsupportedError(f"onnxruntime cannot load it ({first_line(error)})", path) from error
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}

    def run(self, feed: Feed) -> Run:
        """Runs it on a sample.

        Raises:
            UsageError: the sample does not fit the graph.
        """
        inputs = {name: _cast(feed, name, kind, self.path) for name, kind in self.inputs.items()}
        names = [*self.outputs, *self._further]
        try:
            found = self._session.run(names, inputs) if names else []  # all that was asked for are inputs
        except Exception as error:
            raise UsageError(f"the graph cannot be run on the sample ({first_line(error)})", self.path) from error
        known = inputs | dict(zip(names, found, strict=True))
        calls = {key: list(_calls(node, read, known)) for key, (node, read) in self._nodes.items()}
        return Run(
            inputs, {name: known[name] for name in self.outputs}, calls, {name: known[name] for name in self._values}
        )


def _calls(node: Proto, read: Mapping[str, str], known: Mapping[str, Any]) -> Iterator[NodeCall]:
    """Of one node: of what it reads there is an array, or a list of them, one for each call."""
    found = {name: known[value] for name, value in read.items()}
    several = any(isinstance(value, list) for value in found.values())
    for arrays in zip(*found.values(), strict=True) if several else [found.values()]:
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
        yield node_call(node, dict(zip(found, tensors, strict=True)))


def run_in_turn(graphs: Iterable[RecordingGraph], feed: Feed) -> Iterator[Run]:
    """Runs graphs on a sample; an input that it lacks is the output of that name of a graph before.

    Raises:
        UsageError: the sample does not fit the graphs.
    """
    known = dict(feed)
    for graph in graphs:
        done = graph.run(known)
        yield done
        known = {**done.outputs, **known}


def recurrent_nodes(found: OnnxFile) -> dict[str, str]:
    """Name of every recurrent node that can be recorded, as `checkpoint.read` gives it -> a key, which is the same in
    copies of the graph; in the order of execution.

    The key of a node of the main graph is its first output. Nodes in the bodies of If and Loop can be recorded from
    opset 14 on, those in a Scan or in a function of the model cannot.
    """
    names = names_as_read(found)
    keys = {names[layer]: _key(weights["W"].node) for layer, weights in found.weights.items()}
    return {name: key for name, key in keys.items() if key is not None}


def _key(node: Node) -> str | None:
    """None where a node is not recurrent, or cannot be recorded."""
    output, scope = _first_output(node), node.scope
    if not is_recurrent(node.proto) or not output or scope.root.around is not None:
        return None
    if scope.outer is None:
        return output
    chain = [output, scope.attribute]
    for around in node.around():
        if around.proto.op_type not in BODIES or not own(around.proto) or scope.opset < OPSET:
            return None
        chain += [_first_output(around), around.scope.attribute]
    return " in ".join(filter(None, chain))


def _first_output(node: Node) -> str:
    """ "" where it gives nothing."""
    return str(next(filter(None, node.proto.output), ""))


def _add_outputs(model: Proto, names: Iterable[str]) -> list[str]:
    """Makes outputs of the graph of values; returns the names of those that are new."""
    from onnx import ValueInfoProto

    have = {value.name for value in (*model.graph.input, *model.graph.output)}
    further = [name for name in dict.fromkeys(names) if name not in have]
    model.graph.output.extend(ValueInfoProto(name=name) for name in further)
    return further


def node_call(node: Proto, known: Mapping[str, Tensor]) -> NodeCall:
    """The call of a recurrent node for values of the graph by name."""
    attributes = {a.name: a for a in node.attribute}
    batch_first = "layout" in attributes and attributes["layout"].i == 1

    def tensor(at: int) -> Tensor | None:
        name = node.input[at] if at < len(node.input) else ""
        if not name:
            return None
        return known[name].transpose(0, 1) if batch_first and known[name].ndim == 3 else known[name]

    x, lengths, h, c = map(tensor, GIVEN)
    assert x is not None
    steps = torch.full((x.shape[1],), len(x)) if lengths is None else lengths.long()
    return NodeCall(x, steps, (h, c) if node.op_type == "LSTM" else (h,))


def _cast(feed: Feed, name: str, kind: str, path: Path) -> NDArray[Any]:
    """One input of a sample in the type of the graph, "tensor(float)" and so on.

    Raises:
        UsageError: the sample lacks it, or has numbers of another kind.
    """
    if name not in feed:
        has = ", ".join(sorted(feed)[:5]) or "nothing"
        raise UsageError(f"a sample lacks the input '{name}' (it has {has})", path, "Name its arrays as the inputs")
    array = np.asarray(feed[name])
    wanted = kind.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(wanted, wanted if wanted != "string" else "O"))
    if array.dtype == dtype:
        return array
    if array.dtype.kind != dtype.kind:
        raise UsageError(f"the input '{name}' takes {wanted}, and a sample has {array.dtype}", path)
    return array.astype(dtype)
