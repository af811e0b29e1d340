"""What the recurrent layers of the original graphs are called with, sample by sample: recorded once, kept in files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.checkpoint.writing import save_tree
from kruify.conversion.calibration import Moments, check_finite, observer
from kruify.errors import TaskError
from kruify.graphs.record import Feed, RecordingGraph, run_in_turn
from kruify.progress import Progress
from kruify.search.source_graph import SourceGraph
from kruify.training.digest import Digest
from kruify.training.layerwise import RECORDED, is_held_out
from kruify.training.pieces import Call

NOT_RECORDED = "its inputs cannot be recorded where it stands"


class Recording:
    """Calls of all layers of graphs that run one after the other; the numbers stay in files until they are needed.

    Args:
        folder: made for the files. Beyond `layerwise.RECORDED` bytes no further samples are looked at.

    Attributes:
        count: how many samples were recorded.
        digest: of these samples.
    """

    def __init__(
        self, graphs: Sequence[SourceGraph], samples: Iterable[Feed], folder: Path, progress: Progress | None
    ) -> None:
        self.graphs, self.progress, self.count = graphs, progress, 0
        self._reached = defaultdict[tuple[SourceGraph, str], list[int]](list)
        self._folder, digest, total = folder, Digest(), 0
        folder.mkdir()
        chain = recording_chain({g: g.path for g in graphs}, {g: g.recorded_nodes() for g in graphs})
        for number, feed in enumerate(samples):
            digest.add(feed)
            runs = zip(chain, run_in_turn(chain.values(), feed), strict=True)
            calls = {
                (graphs.index(graph), name): [tuple(graph.call(name, call)) for n in nodes for call in run.calls[n]]
                for graph, run in runs
                for name, nodes in graph.nodes.items()
            }
            for (at, name), found in calls.items():
                if found:
                    self._reached[graphs[at], name].append(number)
            with self._file(number).open("wb") as stream:
                save_tree(calls, stream)
            self.count, total = number + 1, total + self._file(number).stat().st_size
            if progress is not None:
                progress(self.count, 0, "recording")
            if total > RECORDED:
                break
        self.digest = digest.hex()

    def calls(self, number: int, graph: SourceGraph, name: str) -> list[Call]:
        """Of one layer, on one sample."""
        calls = torch.load(self._file(number), mmap=True, weights_only=True)
        return [Call(*call) for call in calls.get((self.graphs.index(graph), name), ())]

    def untrained(self, graph: SourceGraph, name: str) -> str | None:
        """Why a layer cannot be trained, None where it can."""
        if not graph.nodes[name]:
            return NOT_RECORDED
        held_out = {is_held_out(number) for number in self._reached[graph, name]}
        if held_out == {True, False}:
            return None
        lacking = " that is not held out" if held_out == {True} else " that is held out" if held_out else ""
        return f"no sample{lacking} reaches it"

    def moments(self) -> dict[SourceGraph, dict[str, Moments]]:
        """Of what the matrices are applied to, on the samples that reach it and are not held out."""
        if all(map(is_held_out, range(self.count))):
            raise TaskError("there is no sample to calibrate on", "--inputs", "Give at least two samples")
        sums: dict[SourceGraph, dict[str, Moments]] = {graph: {} for graph in self.graphs}
        layers = [(graph, name, layer) for graph in self.graphs for name, layer in graph.dense.items()]
        for done, (graph, name, layer) in enumerate(layers, 1):
            observe = observer(f"{name}.", sums[graph])
            for number in self._reached[graph, name]:
                for call in () if is_held_out(number) else self.calls(number, graph, name):
                    _observe(observe, layer, call)
            if self.progress is not None:
                self.progress(done, len(layers), "calibrating")
        for found in sums.values():
            check_finite(found)
        return sums

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.pt"


@torch.no_grad()
def _observe(observe: Callable[..., None], layer: nn.Module, call: Call) -> None:
    begun = call.lengths > 0
    if not begun.any():
        return
    x: Any = call.input[:, begun]
    if int(call.lengths[begun].min()) < len(x):
        x = pack_padded_sequence(x, call.lengths[begun], enforce_sorted=False)
    states = tuple(state[:, begun] for state in call.states)
    observe(layer, (x, states if len(states) > 1 else states[0]), {})


def recording_chain(
    files: Mapping[SourceGraph, Path], nodes: Mapping[SourceGraph, Sequence[str]]
) -> dict[SourceGraph, RecordingGraph]:
    """Graphs that run one after the other and record nodes, as far as these depend on them.

    Args:
        files: of each graph the original, or a copy.
        nodes: of each graph keys of recurrent nodes.
    """
    found: dict[SourceGraph, RecordingGraph] = {}
    read: set[str] = set()
    for graph, file in reversed(list(files.items())):
        is_read = not read.isdisjoint(graph.outputs)
        if is_read or nodes.get(graph):
            found[graph] = RecordingGraph(file, nodes.get(graph, ()), outputs=is_read)
            read |= set(graph.inputs)
    return dict(reversed(list(found.items())))
