"""An ONNX graph made small from samples alone: no labels, no training code.

Low rank of stacked gates at one share for all recurrent matrices, fitted to what the matrices are applied to on the
samples; each layer trained alone on its recorded inputs (training.layerwise); the other constants stored in eight bits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.checkpoint import check_target, read
from kruify.conversion import Conversion, convert
from kruify.conversion.budget import make_budget_plan, parse_budget
from kruify.conversion.build import build_dense, build_layer
from kruify.conversion.calibration import Moments, check_finite, observer
from kruify.conversion.check import load_tensors
from kruify.conversion.locate import AnyTensor, RecurrentLayer, locate_checkpoint
from kruify.conversion.pipeline import found, refuse_converted
from kruify.conversion.plan import LayerPlan, Plan
from kruify.conversion.size import GraphSize, below_smallest, largest_within
from kruify.errors import TaskError, UnsupportedError, UsageError
from kruify.graphs.difference import Difference, DifferenceSums
from kruify.graphs.record import NodeCall, RecordingGraph, recurrent_nodes
from kruify.graphs.size import GraphBytes
from kruify.graphs.writing import kept_constants, write_small
from kruify.layers.storage import mark
from kruify.layers.storage import within as storage_within
from kruify.progress import Progress
from kruify.search.candidates import least_share, stacked_low_rank
from kruify.search.samples import Samples, Source
from kruify.training.layerwise import LR, STEPS, HealedLayer, is_held_out, train_layer, within
from kruify.training.pieces import Call

CALIBRATION = 16
"""Samples that the fit is weighted with."""
GROWTH = 2.0  # a layer that costs too much gets so many times its numbers
DENSE_FROM = 0.5  # a layer that would keep more than this share of its numbers is left dense
Metric = Callable[[str], float]
"""The path of an ONNX file -> one number; higher is better, unless its attribute `higher_is_better` is False."""


@dataclass(frozen=True)
class GraphAttempt:
    """One round.

    Attributes:
        bytes: of the file.
        layers: how each layer was trained, those of earlier rounds included.
        outputs: of the whole graph -> their difference from the original's, on held-out samples.
        metric: None without one.
        drop: how much worse the metric is than the original's, negative if better; without a metric the largest
            relative error of an output.
    """

    bytes: int
    layers: list[HealedLayer]
    outputs: dict[str, Difference]
    metric: float | None
    drop: float


@dataclass(frozen=True)
class GraphCompression:
    """What `compress_graph` found.

    Attributes:
        output: the file that was written.
        before: bytes of the original.
        within: whether `max_drop` is kept.
        best: index of the attempt that was written.
        baseline: the metric of the original, None without one.
        skipped: recurrent layers that stay dense, and why.
    """

    output: Path
    before: int
    within: bool
    best: int
    baseline: float | None
    attempts: list[GraphAttempt]
    skipped: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify compress --inputs --json` prints."""
        after = self.attempts[self.best].bytes
        return {
            "output": str(self.output),
            "bytes": {"before": self.before, "after": after, "ratio": self.before / after},
            "within": self.within,
            "best": self.best,
            "baseline": self.baseline,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped.items()],
        }


def compress_graph(
    model: str | os.PathLike[str],
    samples: Source,
    budget: str,
    output: str | os.PathLike[str],
    *,
    dtype: str = "int8",
    metric: Metric | None = None,
    max_drop: float | None = None,
    attempts: int = 4,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    on_layer: Callable[[HealedLayer], None] | None = None,
    on_attempt: Callable[[GraphAttempt], None] | None = None,
) -> GraphCompression:
    """Writes an ONNX graph that is small and gives nearly what `model` gives; the rest of the graph stays as it is.

    Every eighth sample, from the second on, is held out: it decides which weights are kept, and the differences are
    measured on it. Recurrent nodes in the bodies of other nodes, and those that torch has no layer for, stay dense.

    Args:
        samples: inputs of the graph by name, as `Samples` takes them; gone through several times.
        budget: "size=10x" or "size=600kB" of the file.
        dtype: how weights are stored, the other constants of the graph, too.
        metric: of the whole graph, by the path of its file.
        max_drop: bound on `GraphAttempt.drop`; where it is not kept the layer with the largest error gets twice the
            numbers and is trained again. None takes the first attempt.
        steps, lr: of the training of each layer.
        resume: a folder for the trained layers, which are not trained again.
        on_layer, on_attempt: called after each.

    Raises:
        UsageError: a budget that is none of bytes, no recurrent layer that can be recorded, samples that do not fit.
        PlanError: the budget cannot be met.
    """
    if attempts < 1:
        raise UsageError(f"at least one attempt is needed, got {attempts}", "compress")
    check_target(output, model)
    job = _Job(Path(model), Samples(samples), dtype, seed, progress)
    baseline = None if metric is None else _measured(metric, job.path)
    sign = -1 if getattr(metric, "higher_is_better", True) else 1
    tried: list[GraphAttempt] = []
    best, healed = 0, dict[str, HealedLayer]()
    with tempfile.TemporaryDirectory(prefix="kruify-") as name:
        folder = Path(name)
        conversion = job.planned(budget, folder)
        while True:
            state = None if resume is None else Path(resume) / f"attempt-{len(tried) + 1}"
            for layer in job.heal(conversion, folder, [n for n in job.order if n not in healed], steps, lr, state):
                healed[layer.name] = layer
                if on_layer is not None:
                    on_layer(layer)
            file = job.write(conversion, folder / "small.onnx")
            differences = job.differences(file)
            value = None if metric is None else _measured(metric, file)
            drop = max((d.relative_error for d in differences.values()), default=0.0)
            if value is not None and baseline is not None:
                drop = sign * (value - baseline)
            layers = [healed[name] for name in job.order if name in healed]
            tried.append(GraphAttempt(file.stat().st_size, layers, differences, value, drop))
            if on_attempt is not None:
                on_attempt(tried[-1])
            kept = max_drop is None or drop <= max_drop
            if kept or len(tried) == 1 or drop < tried[best].drop:
                best = len(tried) - 1
                job.write(conversion, Path(output))
            factored = [layer for layer in layers if layer.name in _factored(conversion.plan)]
            if kept or len(tried) == attempts or not factored:
                return GraphCompression(Path(output), job.path.stat().st_size, kept, best, baseline, tried, job.skipped)
            worst = max(factored, key=lambda layer: (layer.error_after, layer.name)).name
            del healed[worst]
            conversion = job.grown(conversion, worst, folder)


class _Job:
    """The graph, its recurrent layers, and what the samples say of them."""

    def __init__(self, path: Path, samples: Samples, dtype: str, seed: int, progress: Progress | None) -> None:
        self.path, self.samples, self.dtype, self.seed, self.progress = path, samples, dtype, seed, progress
        self.checkpoint = read(path)
        refuse_converted(self.checkpoint)
        if self.checkpoint.format != "onnx":
            raise UsageError("samples go with an ONNX graph", path, "Give --task, or call kruify.heal")
        located = locate_checkpoint(self.checkpoint)
        self.nodes = recurrent_nodes(path)
        self.layers = {layer.name: layer for layer in found(located, path) if layer.name in self.nodes}
        inside = [layer.name for layer in located.layers if layer.name not in self.nodes]
        self.skipped = dict(located.skipped) | dict.fromkeys(inside, "it stands in the body of another node")
        if not self.layers:
            raise UnsupportedError("no recurrent node stands in its main graph", path, "Convert it without samples")
        self.order = [name for name in self.nodes if name in self.layers]  # nodes stand in the order of execution
        self.keep = kept_constants(path)
        self.dense = {name: self._dense(layer) for name, layer in self.layers.items()}

    def planned(self, budget: str, folder: Path) -> Conversion:
        """The conversion whose file comes nearest to the budget from below."""
        if not parse_budget(budget).of_file:
            raise UsageError(f"a graph has a budget of bytes, not '{budget}'", hint="Write size=10x or size=600kB")
        layers, whole = list(self.layers.values()), GraphBytes(self.path, graph=False)
        tensors = self.checkpoint.tensors.lazy
        file = GraphSize(tensors, layers, self.dtype, self.keep, before=whole.before, graph=whole)
        limit = file.limit(budget)
        if file.of(Plan()) <= limit:
            return self._convert(Plan(), folder)
        plan = largest_within(file, budget, lambda share: stacked_low_rank(layers, min(share, DENSE_FROM)))
        if plan is None:
            least = stacked_low_rank(layers, least_share(layers)) or Plan()
            raise below_smallest(budget, limit, file.of(least))
        return self._convert(plan, folder)

    def grown(self, conversion: Conversion, name: str, folder: Path) -> Conversion:
        """The conversion with one layer planned anew for more numbers, or left dense; what the others learnt stays."""
        layer, items = self.layers[name], []
        for item in conversion.plan.layers:
            share = GROWTH * _share(item)
            if item.layer.name != name:
                items.append(item)
            elif share < DENSE_FROM:
                budget = f"params={100 * share:.6f}%"
                tensors = {n: self.checkpoint.tensors[n] for n in self.checkpoint.tensors if n.startswith(f"{name}.")}
                items += make_budget_plan(
                    tensors, [layer], budget, input_budget=budget, moments=self.moments, seed=self.seed
                ).layers
        new = self._convert(Plan(items), folder)
        learnt = {n: t for n, t in conversion.tensors.items() if not n.startswith(f"{name}.")}
        return replace(new, tensors={**new.tensors, **learnt})

    def heal(
        self, conversion: Conversion, folder: Path, names: list[str], steps: int, lr: float, state: Path | None
    ) -> Iterator[HealedLayer]:
        """Trains the factored ones of the layers, in order, and puts what they learn into the conversion."""
        items = {item.layer.name: item for item in conversion.plan.layers}
        names = [name for name in names if name in _factored(conversion.plan)]
        small = self.write(conversion, folder / "small.onnx")
        for number, name in enumerate(names):
            layer = build_layer(items[name])
            layer.batch_first = False  # what is recorded comes so
            load_tensors(layer, {n: conversion.tensors[f"{name}.{n}"] for n in layer.state_dict()})
            mark(layer, storage_within(conversion.storage, name))
            file = None if state is None else state / f"layer-{number + 1}.pt"
            told = within(self.progress, number, len(names))
            calls = self._calls(name, small)
            yield train_layer(
                layer, self.dense[name], name, calls, steps=steps, lr=lr, seed=self.seed, file=file, progress=told
            )
            conversion.tensors.update({f"{name}.{n}": t for n, t in layer.state_dict().items()})
            small = self.write(conversion, small)

    def write(self, conversion: Conversion, file: Path) -> Path:
        """Writes the graph with the numbers of a conversion."""
        write_small(self.path, conversion.tensors, conversion.plan.structures(), conversion.storage, file, graph=False)
        return file

    def differences(self, small: Path) -> dict[str, Difference]:
        """Of the outputs on held-out samples."""
        original, other, comparison = RecordingGraph(self.path), RecordingGraph(small), DifferenceSums()
        for number, feed in enumerate(self.samples):
            if is_held_out(number):
                comparison.add(original.run(feed)[0], other.run(feed)[0])
        return comparison.differences()

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of what the matrices are applied to, on samples that are not held out."""
        graph, sums = RecordingGraph(self.path, self.nodes.values(), outputs=False), dict[str, Moments]()
        done = 0
        for number, feed in enumerate(self.samples):
            if done == CALIBRATION:
                break
            if is_held_out(number):
                continue
            calls = graph.run(feed)[1]
            for name, layer in self.dense.items():
                call = self._call(name, calls[self.nodes[name]])
                x: Any = call.input
                if int(call.lengths.min()) < len(x):
                    x = pack_padded_sequence(x, call.lengths, enforce_sorted=False)
                with torch.no_grad():
                    observer(f"{name}.", sums)(layer, (x, call.states if len(call.states) > 1 else call.states[0]), {})
            done += 1
            if self.progress is not None:
                self.progress(done, CALIBRATION, "calibrating")
        if not done:
            raise TaskError("there is no sample to calibrate on", "--inputs", "Give at least two samples")
        check_finite(sums)
        return sums

    def _convert(self, plan: Plan, folder: Path) -> Conversion:
        whole = Plan([LayerPlan(layer, {}) for name, layer in self.layers.items() if name not in _factored(plan)])
        return convert(
            self.checkpoint, plan=Plan([*plan.layers, *whole.layers]), dtype=self.dtype, keep=self.keep, seed=self.seed,
            moments=self.moments if plan.layers else None, output=folder / "small.kru.safetensors",
        )  # fmt: skip

    def _calls(self, name: str, small: Path) -> Iterator[tuple[bool, Call, Tensor]]:
        """What a layer is called with in the original graph, and the input that it gets in the small one."""
        node = self.nodes[name]
        original, other = (RecordingGraph(path, [node], outputs=False) for path in (self.path, small))
        for number, feed in enumerate(self.samples):
            call = self._call(name, original.run(feed)[1][node])
            yield is_held_out(number), call, other.run(feed)[1][node].input

    def _call(self, name: str, call: NodeCall) -> Call:
        layer, batch = self.layers[name], call.input.shape[1]
        zeros = call.input.new_zeros(2 if layer.bidirectional else 1, batch, layer.hidden_size)
        return Call(call.input, call.lengths, tuple(zeros if s is None else s for s in call.states))

    def _dense(self, layer: RecurrentLayer) -> nn.Module:
        module: Any = build_dense(replace(layer, dtype="float32"))
        module.batch_first = False  # what is recorded comes so
        tensors: dict[str, AnyTensor] = {
            name: self.checkpoint.tensors[f"{layer.name}.{name}"].float() for name in module.state_dict()
        }
        load_tensors(module, tensors, str(self.path))
        dense: nn.Module = module.requires_grad_(False).eval()
        return dense


def _factored(plan: Plan) -> set[str]:
    return {item.layer.name for item in plan.layers if item.matrices}


def _share(item: LayerPlan) -> float:
    """Numbers that a layer's factored matrices keep."""
    structures = [s for found in item.matrices.values() for s in found]
    return sum(s.parameters for s in structures) / max(1, sum(s.dense_parameters for s in structures))


def _measured(metric: Metric, file: Path) -> float:
    try:
        return float(metric(str(file)))
    except (TypeError, ValueError) as error:
        raise TaskError(f"the metric gave no number ({error})", "--task", "Return one number for a path") from error
