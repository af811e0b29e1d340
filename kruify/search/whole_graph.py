"""Whole-graph distillation of a `GraphJob`: what stands between its samples and `training.together`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kruify.errors import UnsupportedError, first_line
from kruify.graphs.record import RecordingGraph, Run, run_in_turn
from kruify.graphs.torch_graph import Recurrent, TorchGraph, Values, run_chain
from kruify.layers.storage import mark
from kruify.search.graph_job import GraphJob
from kruify.search.source_graph import SourceGraph
from kruify.training.layerwise import is_held_out
from kruify.training.rounding import unmarked
from kruify.training.together import LR, SAMPLES, STEPS, Recorded, Together, recurrent, train_together

CLOSE = 1e-3
"""Relative error up to which torch and onnxruntime compute the same."""
REFUSED = (RuntimeError, ValueError, TypeError, IndexError)
"""What torch raises where an operator does not take its operands."""


def distil(job: GraphJob, steps: int, lr: float, state: Path | None) -> Together:
    """Trains all factored layers of a job together; `steps` and `lr` are those of a layer alone.

    Where torch cannot run what stands behind the layers nothing is trained, and the result says why.
    """
    steps = int(STEPS * steps)
    names = job.trained_together()
    if not (steps and names):
        inside = steps and job.trained()
        return Together(reason="all stand in the bodies of If or Loop nodes" if inside else "there is nothing to train")
    modules = {name: job.layers[name][0].module(job.layers[name][1]) for name in names}
    try:
        chain = _Chain(job, modules)
        with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
            found = train_together(
                list(modules.values()), chain.graphs, chain.constants, chain.recorded(), Path(folder), steps=steps,
                lr=LR * lr, seed=job.seed, file=None if state is None else state / "together.pt",
                samples=job.recording.digest, progress=job.progress,
            )  # fmt: skip
    except UnsupportedError as error:
        return Together(reason=error.what)  # not the path of a small copy
    job.learn(modules)
    return found


class _Chain:
    """The graphs of a job in torch, with modules for their layers.

    Raises:
        UnsupportedError: torch cannot run them, or computes something else.
    """

    def __init__(self, job: GraphJob, modules: Mapping[str, nn.Module]) -> None:
        self.job = job
        samples = list(islice(job.samples, SAMPLES))
        self.graphs: list[TorchGraph] = []
        live: set[str] = set()
        for graph in job.graphs:
            layers, frozen = dict[str, Recurrent](), dict[str, Recurrent]()
            for name, layer in graph.layers.items():
                module = modules.get(f"{graph.title}{name}")
                run = recurrent(_frozen(graph, name) if module is None else module, layer.bidirectional)
                (frozen if module is None else layers).update(dict.fromkeys(graph.nodes[name], run))
            inputs = RecordingGraph(graph.path).inputs
            computed = [name for name in inputs if name in live and name not in samples[0]]
            self.graphs.append(TorchGraph(job.small(graph), layers, computed, frozen))
            live |= set(self.graphs[-1].outputs)
        self.originals = [RecordingGraph(graph.path) for graph in job.graphs]
        self.small = [
            RecordingGraph(job.small(graph), values=[*torch_graph.constants, *torch_graph.given])
            for graph, torch_graph in zip(job.graphs, self.graphs, strict=True)
        ]
        runs = [list(run_in_turn(self.small, feed)) for feed in samples]
        self.constants = [_values(run, graph.constants) for run, graph in zip(runs[0], self.graphs, strict=True)]
        with unmarked(nn.ModuleList(modules.values())), torch.no_grad():
            self._check(runs)

    def recorded(self) -> Iterator[Recorded]:
        """Of all samples; what comes before the layers is that of the small graphs."""
        for number, feed in enumerate(self.job.samples):
            runs = run_in_turn(self.small, feed), run_in_turn(self.originals, feed)
            given = [_values(run, graph.given) for run, graph in zip(runs[0], self.graphs, strict=True)]
            targets = [_tensors(run.outputs, graph.outputs) for run, graph in zip(runs[1], self.graphs, strict=True)]
            yield Recorded(is_held_out(number), given, targets)

    def _check(self, runs: Sequence[Sequence[Run]]) -> None:
        """Runs several samples at once, as a step of the training does."""
        given = [[_values(run, graph.given) for run, graph in zip(one, self.graphs, strict=True)] for one in runs]
        try:
            found = run_chain(self.graphs, self.constants, given)
        except REFUSED as error:
            raise UnsupportedError(f"torch cannot run it ({first_line(error)})", self.job.graphs[0].path) from error
        for one, outputs in zip(runs, found, strict=True):
            for run, graph, values in zip(one, self.graphs, outputs, strict=True):
                wanted = _tensors(run.outputs, graph.outputs)
                for name, value in values.items():
                    if value.shape != wanted[name].shape or _relative(value, wanted[name]) > CLOSE:
                        raise UnsupportedError(f"torch computes something else for '{name}'", graph.path)


def _frozen(graph: SourceGraph, name: str) -> nn.Module:
    """A layer that stays dense, as the small graph computes it: rounded, in float32."""
    module = graph.module(name).requires_grad_(False).eval()
    mark(module, {})
    return module


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-12))


def _values(run: Run, names: list[str]) -> Values:
    return _tensors(run.values, names)


def _tensors(arrays: Mapping[str, Any], names: list[str]) -> Values:
    if texts := [name for name in names if arrays[name].dtype.kind not in "fiub"]:
        raise UnsupportedError(f"torch has no tensors of the kind of '{texts[0]}'")
    return {name: torch.from_numpy(np.array(arrays[name])) for name in names}
