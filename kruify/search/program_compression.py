"""A network whose file is its program, made small from samples alone: a TorchScript archive, or a Keras model.

The file is run, which reading it never does. What comes out are converted weights, as `kruify.convert` gives them, each
layer trained alone to give what it gave in the original; the program stays what it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kruify.checkpoint import carried, check_model_target, make_folder, read
from kruify.conversion import convert
from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import locate_checkpoint
from kruify.conversion.pipeline import refuse_converted
from kruify.conversion.size import check_budget_target
from kruify.conversion.storing import in_float32, write_converted
from kruify.errors import KruifyError, UsageError, first_line
from kruify.graphs.difference import Difference, DifferenceSums
from kruify.progress import Progress
from kruify.search.graph_compression import GraphAttempt, GraphCompression
from kruify.search.keras_program import KerasProgram
from kruify.search.layer_modules import dense_module, small_module
from kruify.search.planned import Planned, TrainingTime, seconds_of
from kruify.search.programs import Program
from kruify.search.samples import Samples, Source
from kruify.search.scripted import Script
from kruify.tasks.base import evaluating
from kruify.training.layerwise import LR, STEPS, HealedLayer, heal, is_held_out
from kruify.training.together import Together

FilePath = str | os.PathLike[str]
ALONE = "no gradient comes through the file's own program"
NOT_MET = "it is stateful, or its weights are computed by the file's own program"
HINT = "Name the arrays as its inputs, in the dtypes that it takes"


def compress_program(
    model: FilePath,
    samples: Source,
    budget: str,
    output: FilePath,
    *,
    dtype: str = "int8",
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    resume: FilePath | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Planned], None] | None = None,
    on_time: Callable[[float], None] | None = None,
    on_layer: Callable[[HealedLayer], None] | None = None,
) -> GraphCompression:
    """Runs a TorchScript archive or a Keras model, which are programs that can do what their authors like, and writes
    it converted.

    Args:
        model: the file.
        samples: arguments of its `forward`, or inputs of the model, by name, as `Samples` takes them; one in eight is
            held out.
        budget: any of `kruify.convert`.
        output: the converted file: safetensors, or .pt.
        dtype: how weights are stored.
        steps, lr, resume: of the training of each layer, as for `kruify.heal`.
        dry_run, on_plan, on_time: as of `compress_graph`.
        on_layer: called of each layer when all are trained.

    Raises:
        UsageError: another kind of file, or samples that do not fit. UnsupportedError: torch, or Keras, cannot load it.
    """
    path, output = Path(model), Path(output)
    checkpoint = read(path)
    refuse_converted(checkpoint)
    if checkpoint.format not in ("torchscript", "keras"):
        raise UsageError("it is no program that runs", path, "Leave --run out, or call kruify.heal with its code")
    check_model_target(output, *checkpoint.files)
    check_budget_target(budget, output)
    if resume is not None and not dry_run:
        make_folder(resume)
    located, tensors = locate_checkpoint(checkpoint), in_float32(checkpoint.tensors.lazy)
    layers = {layer.name: layer for layer in located.layers}
    program: Program
    if checkpoint.format == "keras":
        program = KerasProgram(path, located.layers, checkpoint.tensors.lazy)
    else:
        program = Script(path, layers, checkpoint.prefix)
    others = [name for name in layers if name not in program.layers]
    dense = program.network({name: dense_module(layers[name], tensors, path) for name in program.layers})
    inputs = _Inputs(Samples(samples), path)
    moments = calibrate(dense, inputs, progress=progress)
    with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
        target = Path(folder) / f"small{output.suffix}"
        conversion = convert(
            checkpoint, budget=budget, moments=moments, dtype=dtype, skip=others, output=target, seed=seed,
            progress=progress,
        )  # fmt: skip
    skipped = dict(located.skipped) | dict.fromkeys(others, NOT_MET)
    planned = Planned(replace(conversion, tensors={}), skipped)
    if on_plan is not None:
        on_plan(planned)
    small = program.network({x.layer.name: small_module(x.layer.name, conversion) for x in conversion.plan.layers})
    train = partial(heal, small, dense, inputs, forward=inputs.forward, steps=steps, lr=lr, seed=seed)
    factored = any(layer.matrices for layer in conversion.plan.layers)
    if dry_run:
        seconds = seconds_of(lambda told: train(progress=told), progress, steps, 0.0) if factored else None
        return GraphCompression(output, [], checkpoint.size, True, 0, None, [], planned, seconds)
    healed: Sequence[HealedLayer] = ()
    if factored:
        healed = train(resume=resume, progress=TrainingTime(progress, steps, 0.0, on_time)).layers
    if on_layer is not None:
        for layer in healed:
            on_layer(layer)
    outputs = _differences(dense, small, inputs)
    write_converted(
        output, {**conversion.tensors, **small.state_dict()}, conversion.plan, conversion.storage,
        source_sha256=checkpoint.sha256, seed=seed, extra=carried(checkpoint), progress=progress,
    )  # fmt: skip
    worst = max((found.relative_error for found in outputs.values()), default=0.0)
    together = Together(reason=ALONE)
    attempt = GraphAttempt(output.stat().st_size, list(healed), together, outputs, None, worst)
    return GraphCompression(output, [output], checkpoint.size, True, 0, None, [attempt], planned)


class _Inputs:
    """Samples as the inputs of a network, and for `calibrate`."""

    def __init__(self, samples: Samples, path: Path) -> None:
        self.samples, self.path = samples, path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self.samples:
            yield {name: self._tensor(name, value) for name, value in sample.items()}

    def _tensor(self, name: str, value: Any) -> Tensor:
        """Raises `UsageError` where torch has no such numbers."""
        try:
            array = np.array(value)
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the array '{name}' of a sample is no tensor ({first_line(error)})", self.path, HINT
            ) from error

    def batches(self, split: str, *, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Those that are not held out."""
        return (batch for number, batch in enumerate(self) if not is_held_out(number))

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Raises `UsageError` where the network does not take the sample."""
        try:
            return model(**batch)
        except KruifyError:
            raise
        except Exception as error:  # whatever the file's program brings forth
            raise UsageError(f"it cannot be run on the sample ({_cause(error)})", self.path, HINT) from error


def _differences(dense: nn.Module, small: nn.Module, inputs: _Inputs) -> dict[str, Difference]:
    """Of the outputs on held-out samples."""
    sums = DifferenceSums()
    for number, batch in enumerate(inputs):
        if is_held_out(number):
            found = []
            for network in (dense, small):
                with evaluating(network):
                    leaves = tree_leaves(inputs.forward(network, batch))
                arrays = [_array(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
                found.append({str(at): array for at, array in enumerate(arrays)})
            sums.add(*found)
    return sums.differences()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """numpy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def _cause(error: Exception) -> str:
    """What an error says; TorchScript says it last, after a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines and "TorchScript" in lines[0] else first_line(error)
