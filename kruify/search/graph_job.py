"""The work of `compress_graph`: ONNX graphs, their recurrent layers, and what the samples say of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.checkpoint import read
from kruify.conversion import Conversion
from kruify.conversion.budget import make_budget_plan, parse_budget
from kruify.conversion.build import build_dense, build_layer
from kruify.conversion.calibration import Moments, check_finite, observer
from kruify.conversion.check import load_tensors
from kruify.conversion.locate import AnyTensor, RecurrentLayer, locate_checkpoint
from kruify.conversion.pipeline import found as layers_of
from kruify.conversion.pipeline import refuse_converted
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.size import GraphSize, allowed_bytes, below_smallest, largest_within
from kruify.conversion.storing import in_float32, planned, rounded, storage_for, with_dense
from kruify.conversion.tensors import convert_tensors
from kruify.decomposition.fitting import metric_of
from kruify.decomposition.weighted import Weighted
from kruify.errors import TaskError, UnsupportedError, UsageError
from kruify.graphs.comparison import Timing, time_graphs
from kruify.graphs.difference import Difference, DifferenceSums
from kruify.graphs.record import NodeCall, RecordingGraph, recurrent_nodes, run_in_turn
from kruify.graphs.size import GraphBytes
from kruify.graphs.writing import kept_constants, write_small
from kruify.layers.storage import mark
from kruify.layers.storage import within as storage_within
from kruify.progress import Progress
from kruify.search.candidates import stacked_low_rank
from kruify.search.samples import Samples
from kruify.training.layerwise import HealedLayer, is_held_out, train_layer, within
from kruify.training.pieces import Call

CALIBRATION = 16
"""Samples that the fit is weighted with."""
GROWTH = 2.0  # a layer that costs too much gets so many times its numbers
DENSE_FROM = 0.5  # a layer that would keep more than this share of its numbers is left dense


class SourceGraph:
    """One ONNX file, and what becomes of it.

    Args:
        title: in front of the names of its layers and outputs, "" where there is one file only.

    Attributes:
        nodes: layer -> output of its node, of all nodes that can be recorded, in the order of execution.
        layers: those of them that can be trained, by their names in the file.
        skipped: other recurrent layers, and why they stay dense.
        bytes: of the file.
        conversion: what it was made into last.
    """

    conversion: Conversion

    def __init__(self, path: Path, dtype: str, seed: int, title: str) -> None:
        self.path, self.dtype, self.seed, self.title = path, dtype, seed, title
        checkpoint = read(path)
        refuse_converted(checkpoint)
        if checkpoint.format != "onnx":
            raise UsageError("samples go with an ONNX graph", path, "Give --task, or call kruify.heal")
        whole = GraphBytes(path, graph=False)
        self.located = locate_checkpoint(checkpoint)
        self.nodes = recurrent_nodes(whole.copy.found)
        located = {layer.name: layer for layer in self.located.layers}
        self.layers = {name: located[name] for name in self.nodes if name in located}
        inside = [name for name in located if name not in self.nodes]
        self.skipped = dict(self.located.skipped) | dict.fromkeys(inside, "it stands in the body of another node")
        self.keep = kept_constants(whole.copy.found)
        self.tensors = in_float32(checkpoint.tensors.lazy)
        self.bytes = whole.before
        self.size = GraphSize(
            self.tensors, list(self.layers.values()), dtype, self.keep, before=whole.before, graph=whole
        )
        self.dense = {name: self._dense(layer) for name, layer in self.layers.items()}

    def convert(self, plan: Plan, moments: Mapping[str, Moments] | None) -> None:
        """Fits what the plan names; everything is rounded to the dtype."""
        layers = [replace(layer, dtype="float32") for layer in self.layers.values()]
        plan = with_dense(plan, layers)
        storage = storage_for(planned(self.tensors, plan), plan, self.dtype, self.keep)
        made = convert_tensors(self.tensors, plan, self.located.in_float32(), moments=moments, seed=self.seed)
        self.conversion = replace(made, tensors={**rounded(made.tensors, plan, storage)}, storage=storage)

    def grow(self, name: str, moments: Mapping[str, Moments]) -> None:
        """Plans one layer anew for more numbers, or leaves it dense; what the others learnt stays."""
        layer, items = self.layers[name], []
        for item in self.conversion.plan.layers:
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
        learnt = {n: t for n, t in self.conversion.tensors.items() if not n.startswith(f"{name}.")}
        self.convert(Plan(items), moments)
        self.conversion.tensors.update(learnt)

    def factored(self) -> list[str]:
        """Layers that are not dense, in the order of execution."""
        return [item.layer.name for item in self.conversion.plan.layers if item.matrices]

    def module(self, name: str) -> nn.Module:
        """One of the layers, with the numbers that it has."""
        item = next(item for item in self.conversion.plan.layers if item.layer.name == name)
        layer = build_layer(item)
        layer.batch_first = False  # what is recorded comes so
        load_tensors(layer, {n: self.conversion.tensors[f"{name}.{n}"] for n in layer.state_dict()})
        mark(layer, storage_within(self.conversion.storage, name))
        return layer

    def learn(self, name: str, module: nn.Module) -> None:
        """Takes the numbers of one layer."""
        self.conversion.tensors.update({f"{name}.{n}": t for n, t in module.state_dict().items()})

    def write(self, file: Path) -> None:
        """Writes the graph with the numbers of the conversion."""
        made = self.conversion
        write_small(self.path, made.tensors, made.plan.structures(), made.storage, file, graph=False)

    def call(self, name: str, call: NodeCall) -> Call:
        """A call of the node of a layer, zeros for states that are not given."""
        layer, batch = self.layers[name], call.input.shape[1]
        zeros = call.input.new_zeros(2 if layer.bidirectional else 1, batch, layer.hidden_size)
        return Call(call.input, call.lengths, tuple(zeros if s is None else s for s in call.states))

    def _dense(self, layer: RecurrentLayer) -> nn.Module:
        module: Any = build_dense(replace(layer, dtype="float32"))
        module.batch_first = False  # what is recorded comes so
        tensors: dict[str, AnyTensor] = {name: self.tensors[f"{layer.name}.{name}"] for name in module.state_dict()}
        load_tensors(module, tensors, str(self.path))
        dense: nn.Module = module.requires_grad_(False).eval()
        return dense


@dataclass(frozen=True)
class _Stack:
    """A matrix with its gates stacked, (rows, cols), by its name in a graph."""

    graph: SourceGraph
    name: str
    rows: int
    cols: int
    scaled: bool

    @property
    def low_rank_numbers(self) -> int:
        """Of one rank."""
        return self.rows + self.cols + self.scaled


class GraphJob:
    """Graphs that run one after the other, and their small copies in a folder.

    Layers are named by graph and name.
    """

    def __init__(
        self, paths: Sequence[Path], samples: Samples, dtype: str, seed: int, progress: Progress | None, folder: Path
    ) -> None:
        self.samples, self.seed, self.progress, self.folder = samples, seed, progress, folder
        titles = [f"{path.stem}: " if len(paths) > 1 else "" for path in paths]
        self.graphs = [SourceGraph(path, dtype, seed, title) for path, title in zip(paths, titles, strict=True)]
        self.layers = {f"{graph.title}{name}": (graph, name) for graph in self.graphs for name in graph.layers}
        self.skipped = {f"{graph.title}{name}": why for graph in self.graphs for name, why in graph.skipped.items()}
        self.bytes = sum(graph.bytes for graph in self.graphs)
        if not self.layers:
            for graph in self.graphs:
                layers_of(graph.located, graph.path)
            raise UnsupportedError("no recurrent node stands in its main graph", paths[0], "Convert it without samples")

    def plan(self, budget: str) -> None:
        """Converts the graphs into those whose files come nearest to the budget from below."""
        if not parse_budget(budget).of_file:
            raise UsageError(f"a graph has a budget of bytes, not '{budget}'", hint="Write size=10x or size=600kB")
        limit = allowed_bytes(budget, self.bytes)
        plans: list[Plan] | None = [Plan() for _ in self.graphs]
        if self._size([Plan() for _ in self.graphs]) > limit:
            plans = largest_within(limit, self._size, self._low_rank)
        if plans is None:
            raise below_smallest(budget, limit, self._size(self._low_rank(0.0)))
        for graph, plan in zip(self.graphs, plans, strict=True):
            graph.convert(plan, self.moments[graph] if plan.layers else None)
            graph.write(self.small(graph))

    def grow(self, layer: str) -> None:
        """Gives a layer more numbers."""
        graph, name = self.layers[layer]
        graph.grow(name, self.moments[graph])
        graph.write(self.small(graph))

    def factored(self) -> list[str]:
        """Layers that are not dense, in the order of execution."""
        return [f"{graph.title}{name}" for graph in self.graphs for name in graph.factored()]

    def heal(self, layers: Sequence[str], steps: int, lr: float, state: Path | None) -> Iterator[HealedLayer]:
        """Trains layers alone, in order."""
        for number, layer in enumerate(layers):
            graph, name = self.layers[layer]
            module = graph.module(name)
            file = None if state is None else state / f"layer-{number + 1}.pt"
            told = within(self.progress, number, len(layers))
            yield train_layer(
                module, graph.dense[name], layer, self._calls(graph, name), steps=steps, lr=lr, seed=self.seed,
                file=file, progress=told,
            )  # fmt: skip
            self.learn({layer: module})

    def learn(self, modules: Mapping[str, nn.Module]) -> None:
        """Takes the numbers of layers."""
        for layer, module in modules.items():
            graph, name = self.layers[layer]
            graph.learn(name, module)
        for graph in dict.fromkeys(self.layers[layer][0] for layer in modules):
            graph.write(self.small(graph))

    def write(self, target: Path) -> None:
        """Writes the small graphs: one to this path, several into this folder."""
        if len(self.graphs) == 1:
            self.graphs[0].write(target)
            return
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kruify.", dir=target) as name:
            for graph in self.graphs:
                graph.write(Path(name) / graph.path.name)
            for file in sorted(Path(name).iterdir()):
                os.replace(file, target / file.name)

    def small(self, graph: SourceGraph) -> Path:
        """The small copy of a graph."""
        return self.folder / graph.path.name

    def differences(self) -> dict[str, Difference]:
        """Of the outputs on held-out samples."""
        originals = [RecordingGraph(graph.path) for graph in self.graphs]
        small, comparison = [RecordingGraph(file) for file in map(self.small, self.graphs)], DifferenceSums()
        for number, feed in enumerate(self.samples):
            if is_held_out(number):
                wanted, found = (self._outputs(graphs, feed) for graphs in (originals, small))
                comparison.add(wanted, found)
        return comparison.differences()

    def written_bytes(self) -> int:
        """Of the small copies."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def timing(self, files: Sequence[Path]) -> Timing | None:
        """How long the graphs and their small copies take on the first sample; None where there is none."""
        originals = [RecordingGraph(graph.path) for graph in self.graphs]
        for feed in self.samples:
            runs = zip(self.graphs, files, run_in_turn(originals, feed), strict=True)
            return reduce(Timing.__add__, [time_graphs(graph.path, small, run.inputs) for graph, small, run in runs])
        return None

    @cached_property
    def moments(self) -> dict[SourceGraph, dict[str, Moments]]:
        """Of what the matrices are applied to, on samples that are not held out."""
        recording = [RecordingGraph(g.path, (g.nodes[n] for n in g.layers)) for g in self.graphs]
        sums: dict[SourceGraph, dict[str, Moments]] = {graph: {} for graph in self.graphs}
        done = 0
        for number, feed in enumerate(self.samples):
            if done == CALIBRATION:
                break
            if is_held_out(number):
                continue
            for graph, run in zip(self.graphs, run_in_turn(recording, feed), strict=True):
                for name, layer in graph.dense.items():
                    call = graph.call(name, run.calls[graph.nodes[name]])
                    x: Any = call.input
                    if int(call.lengths.min()) < len(x):
                        x = pack_padded_sequence(x, call.lengths, enforce_sorted=False)
                    states = call.states if len(call.states) > 1 else call.states[0]
                    with torch.no_grad():
                        observer(f"{name}.", sums[graph])(layer, (x, states), {})
            done += 1
            if self.progress is not None:
                self.progress(done, CALIBRATION, "calibrating")
        if not done:
            raise TaskError("there is no sample to calibrate on", "--inputs", "Give at least two samples")
        for found in sums.values():
            check_finite(found)
        return sums

    def _size(self, plans: Iterable[Plan]) -> int:
        return sum(graph.size.of(plan) for graph, plan in zip(self.graphs, plans, strict=True))

    def _low_rank(self, share: float) -> list[Plan]:
        """Low rank of stacked gates that keeps this share of the numbers, and the most of what all matrices together
        give on the samples. Where it would be no smaller than a matrix, that stays dense."""
        spectra = self._spectra
        if not spectra:
            return [Plan() for _ in self.graphs]
        gains = torch.cat([energies / s.low_rank_numbers for s, energies in spectra.items()])
        owners = torch.cat([torch.full((len(energies),), n) for n, energies in enumerate(spectra.values())])
        owners = owners[gains.argsort(descending=True, stable=True)]
        sizes = torch.tensor([s.low_rank_numbers for s in spectra])[owners]
        taken = owners[sizes.cumsum(0) <= share * sum(s.rows * s.cols for s in spectra)]
        ranks = torch.bincount(taken, minlength=len(spectra)).clamp(min=1).tolist()
        specs: dict[SourceGraph, dict[str, list[str]]] = {graph: {} for graph in self.graphs}
        for s, rank in zip(spectra, ranks, strict=True):
            if rank * s.low_rank_numbers < s.rows * s.cols:
                specs[s.graph][s.name] = [f"stacked:{rank}*({s.rows}x1,1x{s.cols})"]
        return [
            make_plan(list(graph.layers.values()), "dense", "dense", chosen=found) for graph, found in specs.items()
        ]

    @cached_property
    def _spectra(self) -> dict[_Stack, Tensor]:
        """Every matrix that is not narrow -> E||W h||^2 that each singular triplet of it keeps on the samples, the
        heaviest first: pre-activations, whose units are those of all layers."""
        found = {}
        for graph in self.graphs:
            plan = stacked_low_rank(list(graph.layers.values()), 1.0) if graph.layers else None
            for layer, weight, (structure, *_) in plan.matrices() if plan is not None else ():
                name = layer.full_name(weight)
                metric = metric_of(self.moments[graph][name].weight(layer.bias), structure.cols)
                assert isinstance(metric, Weighted)
                stack = _Stack(graph, name, structure.rows, structure.cols, structure.scaled)
                found[stack] = torch.linalg.svdvals(graph.tensors[name].load().double() @ metric.root).square()
        return found

    def _calls(self, graph: SourceGraph, name: str) -> Iterator[tuple[bool, Call, Tensor]]:
        """What a layer is called with in the original graphs, and the input that it gets in the small ones."""
        node, before = graph.nodes[name], self.graphs.index(graph)

        def recording(files: Sequence[Path]) -> list[RecordingGraph]:
            first = [RecordingGraph(file) for file in files[:before]]
            return [*first, RecordingGraph(files[before], [node], outputs=False)]

        original, small = recording([g.path for g in self.graphs]), recording([*map(self.small, self.graphs)])
        for number, feed in enumerate(self.samples):
            calls = [list(run_in_turn(graphs, feed))[-1].calls[node] for graphs in (original, small)]
            yield is_held_out(number), graph.call(name, calls[0]), calls[1].input

    def _outputs(self, graphs: Sequence[RecordingGraph], feed: Mapping[str, Any]) -> dict[str, Any]:
        runs = zip(self.graphs, run_in_turn(graphs, feed), strict=True)
        return {f"{graph.title}{name}": value for graph, run in runs for name, value in run.outputs.items()}
