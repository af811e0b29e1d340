"""The part of an ONNX graph that depends on its recurrent layers, in torch: what comes before them, and all constants,
are given by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint.onnx_constants import lazy_tensor
from kruify.checkpoint.onnx_file import load_model
from kruify.checkpoint.onnx_graph import Proto, own
from kruify.errors import UnsupportedError
from kruify.graphs.operators import OPERATORS, Attributes
from kruify.graphs.record import NodeCall, node_call

Values = dict[str, Tensor]
Recurrent = Callable[[Sequence[NodeCall]], Sequence[tuple[Tensor, tuple[Tensor, ...]]]]
"""Calls of a layer, one for each sample -> for each the outputs (time, batch, directions * hidden), and the final
states, each (directions, batch, hidden)."""


class TorchGraph:
    """What is computed from the outputs of recurrent nodes, node by node and for several samples at once.

    Args:
        path: the model.
        layers: by an output of the node that each stands for.
        frozen: the same for layers that do not change: they are run where they depend on one of the others.
        computed: inputs of the graph that depend on layers of graphs before it.

    Attributes:
        computed: as given.
        outputs: those of the graph that depend on the layers.
        constants: values to be given that are the same for every sample.
        given: values to be given for every sample.

    Raises:
        UnsupportedError: there is an operator that has no form in torch here.
    """

    def __init__(
        self,
        path: Path,
        layers: Mapping[str, Recurrent],
        computed: Collection[str] = (),
        frozen: Mapping[str, Recurrent] | None = None,
    ) -> None:
        self.path, self.layers, self.computed = path, {**layers, **(frozen or {})}, list(computed)
        model = load_model(path)
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        stored = {proto.name: proto for proto in model.graph.initializer}
        fixed, live = set(stored), set(computed)
        for node in model.graph.node:
            if live & set(_names_read(node)) or layers.keys() & set(node.output):
                live |= set(node.output)
            elif fixed.issuperset(filter(None, _names_read(node))):
                fixed |= set(node.output)
        live.discard("")
        self.outputs = [value.name for value in model.graph.output if value.name in live]
        needed, self._nodes = set(self.outputs), list[tuple[Proto, Attributes]]()
        for node in reversed(model.graph.node):
            if needed & live & set(node.output):
                self._nodes.insert(0, (node, _attributes(node, opset, path)))
                needed |= {name for name in node.input if name}
        rest = needed - live
        self._stored = {name: _numbers(stored[name], path) for name in sorted(rest & stored.keys())}
        self.constants = sorted(rest & fixed - stored.keys())
        self.given = sorted(rest - fixed)
        others = [node for node, _ in self._nodes if self._layer(node) is None]
        unknown = [node.op_type for node in others if node.op_type not in OPERATORS or not own(node)]
        if unknown:
            raise UnsupportedError(f"the operator {unknown[0]} has no form in torch here", path)

    def run(self, constants: Values, samples: Sequence[Values]) -> list[Values]:
        """The outputs for each sample; numbers of 16 bits are computed in float32, as the layers are.

        Args:
            constants, samples: what `constants`, `given` and `computed` name.
        """
        values = [_in_float32({**self._stored, **constants, **sample}.items()) for sample in samples]
        for node, attributes in self._nodes:
            if (layer := self._layer(node)) is not None:
                calls = [node_call(node, known) for known in values]
                for known, (output, states) in zip(values, layer(calls), strict=True):
                    known |= _results(node, attributes, output, states)
                continue
            for known in values:
                found = OPERATORS[node.op_type](attributes, *(known[name] if name else None for name in node.input))
                outputs = found if isinstance(found, tuple) else (found,)
                known |= _in_float32(zip(node.output, outputs, strict=False))
        return [{name: known[name] for name in self.outputs} for known in values]

    def _layer(self, node: Proto) -> Recurrent | None:
        return next((self.layers[name] for name in node.output if name in self.layers), None)


def run_chain(
    graphs: Sequence[TorchGraph], constants: Sequence[Values], samples: Sequence[Sequence[Values]]
) -> list[list[Values]]:
    """The outputs of graphs that run one after the other.

    Args:
        constants: of each graph.
        samples: graph by graph for each sample, what `given` names.

    Returns:
        graph by graph for each sample.
    """
    found: list[list[Values]] = [[] for _ in samples]
    known: list[Values] = [{} for _ in samples]
    for at, graph in enumerate(graphs):
        fed = [
            {**sample[at], **{name: earlier[name] for name in graph.computed}}
            for sample, earlier in zip(samples, known, strict=True)
        ]
        for number, outputs in enumerate(graph.run(constants[at], fed)):
            found[number].append(outputs)
            known[number] = {**outputs, **known[number]}
    return found


def _in_float32(values: Iterable[tuple[str, Tensor]]) -> Values:
    """Those of 16 bits."""
    short = torch.float16, torch.bfloat16
    return {name: value.float() if value.dtype in short else value for name, value in values}


def _names_read(node: Proto) -> Iterator[str]:
    """What a node reads, its bodies included, which see the values of the graph."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _names_read(inner)


def _results(node: Proto, a: Attributes, output: Tensor, states: tuple[Tensor, ...]) -> Values:
    """The outputs of a recurrent node, which are Y, Y_h, Y_c."""
    directions = states[0].shape[0]
    y = output.reshape(*output.shape[:2], directions, -1)
    if a.get("layout"):
        y, states = y.transpose(0, 1), tuple(state.transpose(0, 1) for state in states)
    else:
        y = y.transpose(1, 2)
    return {name: value for name, value in zip(node.output, (y, *states), strict=False) if name}


def _attributes(node: Proto, opset: int, path: Path) -> Attributes:
    from onnx import helper

    found: dict[str, Any] = {"opset": opset, "outputs": len(node.output)}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.HasField("t"):
            value = _numbers(attribute.t, path)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _numbers(proto: Proto, path: Path) -> Tensor:
    lazy = lazy_tensor(proto, path)
    if lazy is None:
        raise UnsupportedError(f"the constant {proto.name[:80]} is of a type that torch has not", path)
    return lazy.load()
