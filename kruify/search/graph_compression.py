"""ONNX graphs made small from samples alone: no labels, no training code.

Low rank of stacked gates, each matrix with the rank that pays most on the samples, fitted to what the matrices are
applied to there; each layer trained alone on its recorded inputs (training.layerwise), then all together on the outputs
of the graphs (training.together); the other constants stored in eight bits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from kruify.checkpoint import check_target, make_folder
from kruify.checkpoint.onnx_in_place import DATA
from kruify.conversion.storing import check_storage
from kruify.errors import TaskError, UsageError
from kruify.graphs.comparison import Timing
from kruify.graphs.difference import Difference
from kruify.graphs.forms import NodeForm, check_form
from kruify.progress import Progress
from kruify.search.graph_job import GraphJob
from kruify.search.max_drop import allowed_drop, drop_from
from kruify.search.planned import Planned, TrainingTime, seconds_of
from kruify.search.samples import Samples, Source
from kruify.search.whole_graph import distil
from kruify.training.layerwise import LR, STEPS, HealedLayer
from kruify.training.together import Together

FilePath = str | os.PathLike[str]
Metric = Callable[[str], float]
"""The path of an ONNX file, of a folder where there are several -> one number; higher is better, unless its attribute
`higher_is_better` is False."""


@dataclass(frozen=True)
class GraphAttempt:
    """One round.

    Attributes:
        bytes: of the files.
        layers: how each layer was trained alone, those of earlier rounds included.
        together: how all were trained together after that.
        outputs: of the whole graphs -> their difference from the original's, on held-out samples.
        metric: None without one.
        drop: how much worse the metric is than the original's, negative if better; without a metric the largest
            relative error of an output.
    """

    bytes: int
    layers: list[HealedLayer]
    together: Together
    outputs: dict[str, Difference]
    metric: float | None
    drop: float


@dataclass(frozen=True)
class GraphCompression:
    """What `compress_graph` found.

    Attributes:
        output: the file that was written, or the folder; in a dry run what would be.
        files: all that were written.
        before: bytes of the originals.
        within: whether `max_drop` is kept.
        best: index of the attempt that was written.
        baseline: the metric of the original, None without one.
        attempts: empty in a dry run.
        planned: what the layers became in what was written.
        seconds: that the training of a round would take, measured in a dry run on the first layer; None where nothing
            would be trained.
        timing: of the original and of the small graphs on one sample.
        forms: of the recurrent nodes with factors, where a form was asked for.
    """

    output: Path
    files: list[Path]
    before: int
    within: bool
    best: int
    baseline: float | None
    attempts: list[GraphAttempt]
    planned: Planned
    seconds: float | None = None
    timing: Timing | None = None
    forms: list[NodeForm] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify compress --inputs --json` prints."""
        told = self.planned.to_json()
        if self.attempts:
            after = self.attempts[self.best].bytes
            told["bytes"] |= {"before": self.before, "after": after, "file": after, "ratio": self.before / after}
        return {
            "output": str(self.output) if self.attempts else None,
            "files": [str(file) for file in self.files],
            **told,
            "within": self.within,
            "best": self.best,
            "baseline": self.baseline,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "seconds": self.seconds,
            "timing": None if self.timing is None else asdict(self.timing),
            **({"forms": [asdict(form) for form in self.forms]} if self.forms else {}),
        }


def compress_graph(
    model: FilePath | Sequence[FilePath],
    samples: Source,
    budget: str,
    output: FilePath,
    *,
    dtype: str = "int8",
    form: str = "folded",
    metric: Metric | None = None,
    max_drop: float | str | None = None,
    attempts: int = 4,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    resume: FilePath | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Planned], None] | None = None,
    on_time: Callable[[float], None] | None = None,
    on_layer: Callable[[HealedLayer], None] | None = None,
    on_attempt: Callable[[GraphAttempt], None] | None = None,
) -> GraphCompression:
    """Writes an ONNX graph that is small and gives nearly what `model` gives; the rest of the graph stays as it is.

    Several graphs run one after the other, as an encoder and its decoders do: an input that a sample lacks is the
    output of that name of a graph before. They share one budget.

    Of every eight samples one is held out, the second first: it decides which weights are kept, and the differences are
    measured on it. Recurrent nodes that torch has no layer for stay dense; those that no sample reaches are fitted to
    their weights alone.

    Args:
        model: the graph, or several of one folder in the order in which they run.
        samples: inputs of the graphs by name, as `Samples` takes them; gone through several times.
        budget: "size=10x" or "size=600kB" of all files.
        output: the file to write; of several graphs a folder, in which they keep their names.
        dtype: how weights are stored, the other constants of the graphs, too.
        form: of the recurrent nodes: "folded", "scan" or "auto", as `convert` takes it, timed on the first sample.
        metric: of the whole graph, by the path of its file; of several by that of a folder with them.
        max_drop: bound on `GraphAttempt.drop`, or "1%" of the original's metric; where it is not kept the layer with
            the largest error gets twice the numbers and is trained again. None takes the first attempt.
        steps, lr: of the training of each layer; all together take a quarter of the steps, at a twentieth of the
            rate.
        resume: a folder for the trained layers, which are not trained again.
        dry_run: choose the ranks, begin to train the first layer to see how long it all takes, and write nothing.
        on_plan: called before the training.
        on_time: called once with the seconds that the first round still takes, measured on its first layer.
        on_layer, on_attempt: called after each.

    Raises:
        UsageError: a budget that is none of bytes, no recurrent layer that can be recorded, samples that do not fit.
        PlanError: the budget cannot be met. TaskError: samples that are not finite, or `max_drop` of a metric
            that is not.
    """
    if attempts < 1:
        raise UsageError(f"at least one attempt is needed, got {attempts}", "compress")
    paths = [Path(model)] if isinstance(model, str | os.PathLike) else list(map(Path, model))
    output = Path(output)
    check_form(form)
    check_storage(dtype, graph=True)
    higher = getattr(metric, "higher_is_better", True)
    tried: list[GraphAttempt] = []
    best, healed, forms = 0, dict[str, HealedLayer](), list[NodeForm]()
    with tempfile.TemporaryDirectory(prefix="kruify-") as name:
        job = GraphJob(paths, Samples(samples), dtype, seed, progress, Path(name), form)
        files = _check_targets(output, paths)
        if resume is not None and not dry_run:
            make_folder(resume)
        baseline = None if metric is None or dry_run else _measured(metric, paths)
        allowed = allowed_drop(max_drop, 1.0 if baseline is None else baseline)
        job.plan(budget)
        if on_plan is not None:
            on_plan(job.planned())
        more = job.more()
        if dry_run:
            seconds = seconds_of(partial(_begin, job, steps, lr), progress, steps, more)
            return GraphCompression(output, [], job.bytes, True, 0, None, [], job.planned(), seconds)
        job.progress = TrainingTime(progress, steps, more, on_time)
        while True:
            state = None if resume is None else Path(resume) / f"attempt-{len(tried) + 1}"
            for layer in job.heal([n for n in job.trained() if n not in healed], steps, lr, state):
                healed[layer.name] = layer
                if on_layer is not None:
                    on_layer(layer)
            together = distil(job, steps, lr, state)
            differences = job.differences()
            value = None if metric is None else _measured(metric, [*map(job.small, job.graphs)])
            drop = max((d.relative_error for d in differences.values()), default=0.0)
            if value is not None and baseline is not None:
                drop = drop_from(baseline, value, higher)
            layers = [healed[name] for name in job.layers if name in healed]
            tried.append(GraphAttempt(job.written_bytes(), layers, together, differences, value, drop))
            if on_attempt is not None:
                on_attempt(tried[-1])
            kept = allowed is None or drop <= allowed
            if kept or len(tried) == 1 or drop < tried[best].drop:
                best = len(tried) - 1
                planned = job.planned()
                if forms := job.write(output):
                    tried[-1] = replace(tried[-1], bytes=_bytes(files))
            trained = [healed[name] for name in job.trained()]
            if kept or len(tried) == attempts or not trained:
                timing = job.timing(files)
                return GraphCompression(
                    output, files, job.bytes, kept, best, baseline, tried, planned, timing=timing, forms=forms
                )
            worst = max(trained, key=lambda layer: (layer.error_after, layer.name)).name
            del healed[worst]
            job.grow(worst)


def _begin(job: GraphJob, steps: int, lr: float, progress: Progress) -> None:
    """Trains the first layer."""
    job.progress = progress
    next(job.heal(job.trained(), steps, lr, None), None)


def _check_targets(output: Path, paths: Sequence[Path]) -> list[Path]:
    """The files that will be written."""
    if len(paths) == 1:
        check_target(output, *paths)
        if output.suffix.lower() != ".onnx":
            raise UsageError("what is written is an ONNX graph, and the ending is not .onnx", output, "Write .onnx")
        return [output]
    if len({path.parent for path in paths}) > 1 or len(set(paths)) < len(paths):
        raise UsageError("several graphs stand in one folder, each once", paths[-1], "Put them there")
    if output.exists() and not output.is_dir():
        raise UsageError("several graphs are written into a folder, and this is a file", output)
    targets = [output / path.name for path in paths]
    check_target(output / "-" if output.is_dir() else output, *paths)
    for target in targets if output.is_dir() else ():
        check_target(target, *paths)
    return targets


def _bytes(files: Sequence[Path]) -> int:
    """Of graphs, and of what lies beside them."""
    beside = [file.with_name(file.name + DATA) for file in files]
    return sum(file.stat().st_size for file in (*files, *filter(Path.exists, beside)))


def _measured(metric: Metric, files: Sequence[Path]) -> float:
    value = metric(str(files[0] if len(files) == 1 else files[0].parent))
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TaskError(f"the metric gave no number ({error})", "--task", "Return one number for a path") from error
