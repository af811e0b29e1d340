"""What the recurrent layers of the original graphs are called with, sample by sample: recorded once, kept in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
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

CALIBRATION = 16
"""Samples that the fit is weighted with."""


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
        self._folder, digest, total = folder, Digest(), 0
        folder.mkdir()
        chain = recording_chain({g: g.path for g in graphs}, {g: [g.nodes[n] for n in g.layers] for g in graphs})
        for number, feed in enumerate(samples):
            digest.add(feed)
            runs = zip(chain, run_in_turn(chain.values(), feed), strict=True)
            calls = {
                (graphs.index(graph), name): tuple(graph.call(name, run.calls[graph.nodes[name]]))
                for graph, run in runs
                for name in graph.layers
            }
            with self._file(number).open("wb") as stream:
                save_tree(calls, stream)
            self.count, total = number + 1, total + self._file(number).stat().st_size
            if progress is not None:
                progress(self.count, 0, "recording")
            if total > RECORDED:
                break
        self.digest = digest.hex()

    def call(self, number: int, graph: SourceGraph, name: str) -> Call:
        """Of one layer, on one sample."""
        calls = torch.load(self._file(number), mmap=True, weights_only=True)
        return Call(*calls[self.graphs.index(graph), name])

    def moments(self) -> dict[SourceGraph, dict[str, Moments]]:
        """Of what the matrices are applied to, on the first `CALIBRATION` samples that are not held out."""
        numbers = list(islice((n for n in range(self.count) if not is_held_out(n)), CALIBRATION))
        if not numbers:
            raise TaskError("there is no sample to calibrate on", "--inputs", "Give at least two samples")
        sums: dict[SourceGraph, dict[str, Moments]] = {graph: {} for graph in self.graphs}
        layers = [(graph, name, layer) for graph in self.graphs for name, layer in graph.dense.items()]
        for done, (graph, name, layer) in enumerate(layers, 1):
            observe = observer(f"{name}.", sums[graph])
            for number in numbers:
                call = self.call(number, graph, name)
                x: Any = call.input
                if int(call.lengths.min()) < len(x):
                    x = pack_padded_sequence(x, call.lengths, enforce_sorted=False)
                with torch.no_grad():
                    observe(layer, (x, call.states if len(call.states) > 1 else call.states[0]), {})
            if self.progress is not None:
                self.progress(done, len(layers), "calibrating")
        for found in sums.values():
            check_finite(found)
        return sums

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.pt"


def recording_chain(
    files: Mapping[SourceGraph, Path], nodes: Mapping[SourceGraph, Sequence[str]]
) -> dict[SourceGraph, RecordingGraph]:
    """Graphs that run one after the other and record nodes, as far as these depend on them.

    Args:
        files: of each graph the original, or a copy.
        nodes: of each graph outputs of recurrent nodes.
    """
    found: dict[SourceGraph, RecordingGraph] = {}
    read: set[str] = set()
    for graph, file in reversed(list(files.items())):
        is_read = not read.isdisjoint(graph.outputs)
        if is_read or nodes.get(graph):
            found[graph] = RecordingGraph(file, nodes.get(graph, ()), outputs=is_read)
            read |= set(graph.inputs)
    return dict(reversed(list(found.items())))
