"""One ONNX file that becomes small: its recurrent layers, their plan, and the numbers that they have learnt."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kruify.checkpoint import read
from kruify.checkpoint.onnx_file import not_in_torch
from kruify.conversion import Conversion
from kruify.conversion.budget import make_budget_plan
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import MATRIX, RecurrentLayer, locate_checkpoint
from kruify.conversion.pipeline import refuse_converted
from kruify.conversion.plan import Plan
from kruify.conversion.size import GraphSize
from kruify.conversion.storing import in_float32, planned, rounded, storage_for, with_dense
from kruify.conversion.tensors import convert_tensors
from kruify.errors import UsageError
from kruify.graphs.contents import names_as_read
from kruify.graphs.forms import NodeForm, SmallGraph, write_in_form
from kruify.graphs.record import NodeCall, recurrent_nodes
from kruify.graphs.size import GraphBytes
from kruify.graphs.writing import kept_constants
from kruify.search.layer_modules import dense_module, small_module
from kruify.training.pieces import Call

GROWTH = 2.0  # a layer that costs too much gets so many times its numbers
DENSE_FROM = 0.5  # a layer that would keep more than this share of its numbers is left dense


class SourceGraph:
    """One ONNX file, and what becomes of it.

    Args:
        title: in front of the names of its layers and outputs, "" where there is one file only.
        form: of its recurrent nodes in what is written at the end (`graphs.write_in_form`).

    Attributes:
        layers: those that become small, by their names in the file, in the order of execution; of layers that share all
            of their weights the first one.
        twins: layer -> all that have its weights, itself the first.
        nodes: layer -> keys of the nodes with its weights that can be recorded (`recurrent_nodes`).
        apart: layers that stand elsewhere than in nodes of the main graph.
        skipped: other recurrent layers, and why they stay dense.
        inputs, outputs: of the graph; constants are no inputs.
        bytes: of the file.
        conversion: what it was made into last.
    """

    conversion: Conversion

    def __init__(self, path: Path, dtype: str, seed: int, title: str, form: str) -> None:
        self.path, self.dtype, self.seed, self.title, self.form = path, dtype, seed, title, form
        checkpoint = read(path, graph=True)
        refuse_converted(checkpoint)
        if checkpoint.format != "onnx":
            program = checkpoint.format in ("torchscript", "keras")
            if program:
                what = f"a {checkpoint.format} file is a program, and samples need it to run"
                raise UsageError(what, path, "Add --run if you trust it")
            what = "samples go with an ONNX graph, a TorchScript archive or a Keras model"
            raise UsageError(what, path, "Give --task, or call kruify.heal")
        whole = GraphBytes(path, scan=form != "folded")
        graph = whole.copy.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in constants]
        self.outputs = [value.name for value in graph.output]
        self.located = locate_checkpoint(checkpoint)
        found, keys = whole.copy.found, recurrent_nodes(whole.copy.found)
        self.layers, self.twins = dict[str, RecurrentLayer](), dict[str, list[RecurrentLayer]]()
        self.nodes, self.apart = dict[str, list[str]](), set[str]()
        in_file, first = {read: name for name, read in names_as_read(found).items()}, dict[Hashable, str]()
        self.skipped, self._untouched = dict(self.located.skipped), list[RecurrentLayer]()
        for layer in self.located.layers:
            node = in_file.get(layer.name)
            weights = {} if node is None else found.weights[node]
            if weights and (reason := not_in_torch(weights)) is not None:
                self.skipped[layer.name] = reason
                self._untouched.append(layer)
                continue
            same = layer.kind, layer.nonlinearity, *((p, w.constant.tensor.identity) for p, w in weights.items())
            name = first.setdefault(same if weights else layer.name, layer.name)
            if node is not None:
                whole.owners[node] = name
            self.layers.setdefault(name, layer)
            self.twins.setdefault(name, []).append(layer)
            self.nodes.setdefault(name, []).extend(keys[n] for n in [layer.name] if n in keys)
            if not weights or weights["W"].node.scope is not found.scopes[0]:
                self.apart.add(name)
        self.keep = kept_constants(whole.copy.found)
        self.tensors = in_float32(checkpoint.tensors.lazy)
        self.bytes = whole.before
        self.size = GraphSize(self.tensors, self._all_layers(), dtype, self.keep, before=whole.before, graph=whole)
        self.dense = {name: dense_module(layer, self.tensors, path) for name, layer in self._modules()}

    def convert(self, plan: Plan, moments: Mapping[str, Moments] | None) -> None:
        """Fits what the plan names; everything is rounded to the dtype."""
        layers = [replace(layer, dtype="float32") for layer in self._all_layers()]
        plan = with_dense(self._with_twins(plan), layers)
        storage = storage_for(planned(self.tensors, plan), plan, self.dtype, self.keep)
        made = convert_tensors(self.tensors, plan, self.located.in_float32(), moments=moments, seed=self.seed)
        self.conversion = replace(made, tensors={**rounded(made.tensors, plan, storage)}, storage=storage)

    def _modules(self) -> list[tuple[str, RecurrentLayer]]:
        return [(name, layer) for name, layer in self.layers.items() if layer.kind != MATRIX]

    def recorded_nodes(self) -> list[str]:
        """Keys of all nodes that can be recorded."""
        return [node for nodes in self.nodes.values() for node in nodes]

    def size_of(self, plan: Plan) -> int:
        """Bytes of the graph's files that a plan of `layers` gives."""
        return self.size.of(self._with_twins(plan))

    def grow(self, name: str, moments: Mapping[str, Moments]) -> None:
        """Plans one layer anew for more numbers, or leaves it dense; what the others learnt stays."""
        layer, items = self.layers[name], []
        for item in self.conversion.plan.layers:
            if item.layer.name not in self.layers:
                continue
            structures = [s for found in item.matrices.values() for s in found]
            if item.layer.name != name:
                items.append(item)
                continue
            share = sum(s.parameters for s in structures) / sum(s.dense_parameters for s in structures)
            if GROWTH * share < DENSE_FROM:
                budget = f"params={100 * GROWTH * share:.6f}%"
                tensors = {n: t for n, t in self.tensors.items() if n.startswith(f"{name}.")}
                items += make_budget_plan(
                    tensors, [layer], budget, input_budget=budget, moments=moments, seed=self.seed
                ).layers
        anew = tuple(f"{layer.name}." for layer in self.twins[name])
        learnt = {n: t for n, t in self.conversion.tensors.items() if not n.startswith(anew)}
        self.convert(Plan(items), moments)
        self.conversion.tensors.update(learnt)

    def factored(self) -> list[str]:
        """Layers that are not dense, in the order of execution."""
        return [n for item in self.conversion.plan.layers if item.matrices and (n := item.layer.name) in self.layers]

    def module(self, name: str) -> nn.Module:
        """One of the layers, with the numbers that it has."""
        return small_module(name, self.conversion)

    def learn(self, name: str, module: nn.Module) -> None:
        """Takes the numbers of one layer."""
        state = module.state_dict()
        self.conversion.tensors.update({layer.full_name(n): t for layer in self.twins[name] for n, t in state.items()})

    def write(self, file: Path, form: str = "folded", feed: Mapping[str, Any] | None = None) -> list[NodeForm]:
        """Writes the graph with the numbers of the conversion; returns what its nodes became where a form is wanted.

        Args:
            feed: inputs that its forms are timed on.
        """
        made = self.conversion
        small = SmallGraph(self.path, made.tensors, made.plan.structures(), made.storage)
        forms = write_in_form(small, file, form, feed)[1]
        return [replace(one, name=f"{self.title}{one.name}") for one in forms]

    def _all_layers(self) -> list[RecurrentLayer]:
        return [*(layer for twins in self.twins.values() for layer in twins), *self._untouched]

    def _with_twins(self, plan: Plan) -> Plan:
        """A plan of `layers` for all that have their weights."""
        items = {item.layer.name: item for item in plan.layers}
        return Plan([replace(items[n], layer=twin) for n, twins in self.twins.items() if n in items for twin in twins])

    def call(self, name: str, call: NodeCall) -> Call:
        """A call of the node of a layer, zeros for states that are not given."""
        layer, batch = self.layers[name], call.input.shape[1]
        zeros = call.input.new_zeros(2 if layer.bidirectional else 1, batch, layer.hidden_size)
        return Call(call.input, call.lengths, tuple(zeros if s is None else s for s in call.states))
