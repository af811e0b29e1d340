"""The work of `compress_graph`: graphs that run one after the other, and their small copies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kruify.checkpoint.writing import move_files
from kruify.conversion.budget import parse_budget
from kruify.conversion.calibration import Moments
from kruify.conversion.pipeline import found as layers_of
from kruify.conversion.plan import Plan
from kruify.conversion.result import ByteCounts, Conversion, ParameterCounts
from kruify.conversion.size import allowed_bytes, below_smallest, largest_within
from kruify.errors import UnsupportedError, UsageError
from kruify.graphs.comparison import Timing, time_graphs
from kruify.graphs.difference import Difference, DifferenceSums
from kruify.graphs.forms import NodeForm
from kruify.graphs.record import RecordingGraph, run_in_turn
from kruify.progress import Progress
from kruify.search.graph_ranks import GraphRanks
from kruify.search.planned import Planned
from kruify.search.recording import NOT_RECORDED, Recording, recording_chain
from kruify.search.samples import Samples
from kruify.search.source_graph import SourceGraph
from kruify.training.layerwise import STEPS_OF_A_BATCH, HealedLayer, is_held_out, train_layer, within
from kruify.training.pieces import Call
from kruify.training.together import SAMPLES, STEPS


class GraphJob:
    """Graphs that run one after the other, and their small copies in a folder.

    Layers are named by graph and name.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        samples: Samples,
        dtype: str,
        seed: int,
        progress: Progress | None,
        folder: Path,
        form: str = "folded",
    ) -> None:
        self.samples, self.seed, self.progress, self.folder = samples, seed, progress, folder
        titles = [f"{path.stem}: " if len(paths) > 1 else "" for path in paths]
        self.graphs = [SourceGraph(path, dtype, seed, title, form) for path, title in zip(paths, titles, strict=True)]
        self.layers = {f"{graph.title}{name}": (graph, name) for graph in self.graphs for name in graph.layers}
        self.skipped = {f"{graph.title}{name}": why for graph in self.graphs for name, why in graph.skipped.items()}
        self.bytes = sum(graph.bytes for graph in self.graphs)
        if not self.layers:
            for graph in self.graphs:
                layers_of(graph.located, graph.path)
        if not any(nodes for graph in self.graphs for nodes in graph.nodes.values()):
            passed = [*self.skipped.items(), *((name, NOT_RECORDED) for name in self.layers)][:3]
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed)
            what = f"none of its recurrent layers can be trained on samples ({reasons})"
            raise UnsupportedError(what, paths[0], "Convert it without samples")

    def more(self) -> float:
        """About how long the training of all layers together takes, in units of what they take alone."""
        together = self.trained_together()
        if not together:
            return 0.0
        graph, name = self.layers[together[0]]
        numbers = range(min(8, self.recording.count))
        calls = [call for number in numbers for call in self.recording.calls(number, graph, name)]
        steps = sum(int(call.lengths.sum()) for call in calls) / len(numbers)
        return STEPS * SAMPLES * steps / STEPS_OF_A_BATCH

    def plan(self, budget: str) -> None:
        """Converts the graphs into those whose files come nearest to the budget from below."""
        if not parse_budget(budget).of_file:
            raise UsageError(f"a graph has a budget of bytes, not '{budget}'", hint="Write size=10x or size=600kB")
        limit = self.allowed = allowed_bytes(budget, self.bytes)
        plans: list[Plan] | None = [Plan() for _ in self.graphs]
        if self._size([Plan() for _ in self.graphs]) > limit:
            plans = largest_within(limit, self._size, self.ranks.plans)
        if plans is None:
            raise below_smallest(budget, limit, self._size(self.ranks.plans(0.0)))
        for graph, plan in zip(self.graphs, plans, strict=True):
            graph.convert(plan, self.moments[graph] if plan.layers else None)
            graph.write(self.small(graph))

    def planned(self) -> Planned:
        """What the graphs are converted into, as one."""
        made = [(graph, graph.conversion) for graph in self.graphs]
        matrices = [
            replace(gate, name=f"{graph.title}{gate.name}", layer=f"{graph.title}{gate.layer}")
            for graph, conversion in made
            for gate in conversion.matrices
        ]
        counts = zip(*(astuple(conversion.parameters) for _, conversion in made), strict=True)
        size = self.written_bytes()
        found = ByteCounts(self.bytes, size, file=size, allowed=self.allowed)
        return Planned(
            Conversion(Plan(), matrices, ParameterCounts(*map(sum, counts)), bytes=found),
            self._dense(),
            self._untrained(),
        )

    def _dense(self) -> dict[str, str]:
        """Layers and matrices that stay dense, and why."""
        enough = "stored in fewer bits the file is small enough"
        why = "low rank would save too little in it" if self.factored() else enough
        found = dict(self.skipped)
        for graph in self.graphs:
            factored = graph.conversion.plan.structures()
            for layer in graph.layers.values():
                names = [layer.full_name(weight) for weight in layer.weights]
                found |= {f"{graph.title}{name}": why for name in names if name not in factored}
        return found

    def grow(self, layer: str) -> None:
        """Gives a layer more numbers."""
        graph, name = self.layers[layer]
        graph.grow(name, self.moments[graph])
        graph.write(self.small(graph))

    def factored(self) -> list[str]:
        """Layers that are not dense, in the order of execution."""
        return [f"{graph.title}{name}" for graph in self.graphs for name in graph.factored()]

    def trained(self) -> list[str]:
        """Layers that are not dense and that samples reach, in the order of execution."""
        return [layer for layer in self.factored() if self.recording.untrained(*self.layers[layer]) is None]

    def trained_together(self) -> list[str]:
        """Those of them that stand in the main graphs: torch runs no bodies of other nodes."""
        return [layer for layer in self.trained() if self.layers[layer][1] not in self.layers[layer][0].apart]

    def _untrained(self) -> dict[str, str]:
        """Other layers that are not dense, and why they are not trained."""
        reasons = {layer: self.recording.untrained(*self.layers[layer]) for layer in self.factored()}
        return {layer: reason for layer, reason in reasons.items() if reason is not None}

    def heal(self, layers: Sequence[str], steps: int, lr: float, state: Path | None) -> Iterator[HealedLayer]:
        """Trains layers alone, in order."""
        for number, layer in enumerate(layers):
            graph, name = self.layers[layer]
            module = graph.module(name)
            file = None if state is None else state / f"layer-{number + 1}.pt"
            told = within(self.progress, number, len(layers))
            yield train_layer(
                module, graph.dense[name], layer, self._calls(graph, name), steps=steps, lr=lr, seed=self.seed,
                file=file, samples=self.recording.digest, progress=told,
            )  # fmt: skip
            self.learn({layer: module})

    def learn(self, modules: Mapping[str, nn.Module]) -> None:
        """Takes the numbers of layers."""
        for layer, module in modules.items():
            graph, name = self.layers[layer]
            graph.learn(name, module)
        for graph in dict.fromkeys(self.layers[layer][0] for layer in modules):
            graph.write(self.small(graph))

    def write(self, target: Path) -> list[NodeForm]:
        """Writes the small graphs: one to this path, several into this folder; their forms are timed on the first
        sample."""
        feeds = dict.fromkeys(self.graphs) if self.graphs[0].form == "folded" else self._first_inputs()
        if len(self.graphs) == 1:
            return self.graphs[0].write(target, self.graphs[0].form, feeds[self.graphs[0]])
        forms = list[NodeForm]()
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kruify.", dir=target) as name:
            for graph in self.graphs:
                forms += graph.write(Path(name) / graph.path.name, graph.form, feeds[graph])
            move_files(sorted(Path(name).iterdir()), target)
        return forms

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
        feeds = self._first_inputs()
        pairs = [(graph.path, small, feed) for (graph, feed), small in zip(feeds.items(), files, strict=True) if feed]
        return reduce(Timing.__add__, [time_graphs(*pair) for pair in pairs]) if pairs else None

    def _first_inputs(self) -> dict[SourceGraph, Mapping[str, Any] | None]:
        """The inputs of each graph on the first sample; None where there is none."""
        originals = [RecordingGraph(graph.path) for graph in self.graphs]
        for feed in self.samples:
            return {graph: run.inputs for graph, run in zip(self.graphs, run_in_turn(originals, feed), strict=True)}
        return dict.fromkeys(self.graphs)

    @cached_property
    def recording(self) -> Recording:
        """Of the original graphs on the samples."""
        return Recording(self.graphs, self.samples, self.folder / "recording", self.progress)

    @cached_property
    def moments(self) -> dict[SourceGraph, dict[str, Moments]]:
        """Of what the matrices are applied to."""
        return self.recording.moments()

    @cached_property
    def ranks(self) -> GraphRanks:
        return GraphRanks(self.graphs, self.moments)

    def _size(self, plans: Iterable[Plan]) -> int:
        return sum(graph.size_of(plan) for graph, plan in zip(self.graphs, plans, strict=True))

    def _calls(self, graph: SourceGraph, name: str) -> Iterator[tuple[bool, Call, Tensor]]:
        """What a layer is called with in the original graphs, and the input that it gets in the small ones."""
        nodes = graph.nodes[name]
        chain = recording_chain({g: self.small(g) for g in self.graphs}, {graph: nodes})
        for number, feed in zip(range(self.recording.count), self.samples, strict=False):
            *_, run = run_in_turn(chain.values(), feed)
            originals = self.recording.calls(number, graph, name)
            given = [call.input for node in nodes for call in run.calls[node]]
            if len(given) != len(originals):  # the small graph takes another branch, or more turns
                given = [call.input for call in originals]
            for original, x in zip(originals, given, strict=True):
                yield is_held_out(number), original, x

    def _outputs(self, graphs: Sequence[RecordingGraph], feed: Mapping[str, Any]) -> dict[str, Any]:
        runs = zip(self.graphs, run_in_turn(graphs, feed), strict=True)
        return {f"{graph.title}{name}": value for graph, run in runs for name, value in run.outputs.items()}
