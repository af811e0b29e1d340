"""Whole-graph distillation: all small layers of one or several graphs are trained together to give the outputs that the
original graphs give on samples, without labels.

What a sample gives to the layers, and the original outputs, lie in files; of a step only `SAMPLES` are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kruify.checkpoint.writing import save_tree
from kruify.errors import UnsupportedError, UsageError
from kruify.graphs.record import NodeCall
from kruify.graphs.torch_graph import Recurrent, TorchGraph, Values, run_chain
from kruify.progress import Progress
from kruify.tasks.base import evaluating
from kruify.training.digest import fingerprint
from kruify.training.fitting import fit
from kruify.training.layerwise import RECORDED
from kruify.training.randomness import derived_seed
from kruify.training.rounding import rounded_weights, unmarked

SAMPLES = 4  # of a step
STEPS, LR = 0.25, 0.05  # of those of a layer that is trained alone


@dataclass(frozen=True)
class Together:
    """How all layers were trained together.

    Attributes:
        error_before, error_after: root of the mean, over the outputs, of the squares of their relative errors, on
            held-out samples; None where nothing was trained. Weights that are no better are not kept.
        steps: of the optimiser.
        reason: why nothing was trained, "" where something was.
    """

    error_before: float | None = None
    error_after: float | None = None
    steps: int = 0
    reason: str = ""


Output = tuple[int, str]
"""Number of a graph, and a name there."""


class Recorded(NamedTuple):
    """One sample.

    Attributes:
        given: for each graph what `TorchGraph.given` names.
        targets: for each graph what the original gives.
    """

    held_out: bool
    given: list[Values]
    targets: list[Values]


def recurrent(layer: Any, bidirectional: bool) -> Recurrent:
    """A layer that takes (time, batch, features), for all samples at once."""

    def run(calls: Sequence[NodeCall]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        steps, sizes = [len(call.input) for call in calls], [call.input.shape[1] for call in calls]
        longest, directions = max(steps), 1 + bidirectional
        x = torch.cat([nn.functional.pad(call.input, (0, 0, 0, 0, 0, longest - len(call.input))) for call in calls], 1)
        lengths = torch.cat([call.lengths for call in calls])
        empty = [x.new_zeros(directions, size, layer.hidden_size) for size in sizes]
        states = tuple(
            torch.cat([zeros if state is None else state for state, zeros in zip(one, empty, strict=True)], 1)
            for one in zip(*(call.states for call in calls), strict=True)
        )
        given = states if len(states) > 1 else states[0]
        if int(lengths.min()) < longest:
            packed, final = layer(pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False), given)
            output = pad_packed_sequence(packed, total_length=longest)[0]
            begun = (lengths > 0)[:, None]  # onnxruntime's nodes give zeros for a sequence of no steps
            output = output * begun
            final = tuple(s * begun for s in final) if isinstance(final, tuple) else final * begun
        else:
            output, final = layer(x, given)
        parts = [torch.split(s, sizes, 1) for s in (final if isinstance(final, tuple) else (final,))]
        outputs = torch.split(output, sizes, 1)
        return [(outputs[n][: steps[n]], tuple(part[n] for part in parts)) for n in range(len(calls))]

    return run


def train_together(
    layers: Sequence[nn.Module],
    graphs: Sequence[TorchGraph],
    constants: Sequence[Values],
    recorded: Iterable[Recorded],
    folder: Path,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    file: Path | None = None,
    samples: str = "",
    progress: Progress | None = None,
) -> Together:
    """Trains the layers, in place, which `graphs` run.

    Args:
        constants: of each graph.
        folder: for the samples.
        file: for the state, from which an interrupted run goes on.
        samples: the digest of what `recorded` comes from.

    Raises:
        UsageError: nothing is held out, or nothing else; `file` is of another run.
        UnsupportedError: the graphs have no output to learn, or one that is NaN or infinite.
    """
    data = _Data(graphs, recorded, folder)
    if not (data.train and data.held_out):
        raise UsageError("nothing is held out, or nothing else", "--inputs", "Give two samples at least")
    means = [*data.mean_square[False].items(), *data.mean_square[True].items()]
    if broken := [name for (_, name), mean in means if not math.isfinite(mean)]:
        raise UnsupportedError(f"the original gives NaN or infinite numbers as '{broken[0]}'")
    if not all(data.mean_square.values()):
        raise UnsupportedError("no output of real numbers depends on the layers")
    model = nn.ModuleList(layers)

    def squares(numbers: Sequence[int], whole: Mapping[Output, float]) -> Tensor:
        """Of the relative errors, mean over the outputs, for some samples."""
        samples = [data.sample(number) for number in numbers]
        found = run_chain(graphs, constants, [sample.given for sample in samples])
        wrong = []
        for (at, name), mean in whole.items():
            pairs = [(one[at][name], sample.targets[at][name]) for one, sample in zip(found, samples, strict=True)]
            errors = torch.stack([(output - target).square().sum() for output, target in pairs])
            wrong.append(errors.mean() / mean)
        return torch.stack(wrong).mean()

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, "together", step))
        drawn = torch.randperm(len(data.train), generator=generator)[:SAMPLES].tolist()
        model.train()
        return squares([data.train[number] for number in drawn], data.mean_square[False])

    def error() -> float:
        with evaluating(model), rounded_weights(model), unmarked(model):
            batches = [data.held_out[at : at + SAMPLES] for at in range(0, len(data.held_out), SAMPLES)]
            total = sum(len(batch) * float(squares(batch, data.mean_square[True])) for batch in batches)
        return math.sqrt(total / len(data.held_out))

    settings = {"steps": steps, "lr": lr, "seed": seed, "samples": samples}
    settings["weights"] = fingerprint(*(layer.state_dict() for layer in layers))
    before, after, done = fit(
        model, loss, error, "whole graph", steps=steps, lr=lr, file=file, settings=settings, progress=progress
    )
    return Together(before, after, done)


class _Data:
    """Samples in files, one each.

    Attributes:
        train, held_out: numbers of the samples.
        mean_square: held out or not -> graph, output -> sum of its squares, mean over the samples; of the outputs that
            are real numbers, not zero, and no input of a later graph.
    """

    def __init__(self, graphs: Sequence[TorchGraph], recorded: Iterable[Recorded], folder: Path) -> None:
        self.folder, self.train, self.held_out = folder, list[int](), list[int]()
        names = [
            (at, name)
            for at, graph in enumerate(graphs)
            for name in graph.outputs
            if not any(name in later.computed for later in graphs[at + 1 :])
        ]
        sums, total = {held_out: dict.fromkeys(names, 0.0) for held_out in (False, True)}, 0
        for number, sample in enumerate(recorded):
            (self.held_out if sample.held_out else self.train).append(number)
            for at, name in names:
                value = sample.targets[at][name]
                if value.is_floating_point():
                    sums[sample.held_out][at, name] += float(value.double().square().sum())
            with self._file(number).open("wb") as stream:
                save_tree(tuple(sample), stream)
            total += self._file(number).stat().st_size
            if total > RECORDED:
                break
        counts = {False: len(self.train), True: len(self.held_out)}
        self.mean_square = {
            held_out: {key: value / counts[held_out] for key, value in found.items() if value}
            for held_out, found in sums.items()
        }

    def sample(self, number: int) -> Recorded:
        return Recorded(*torch.load(self._file(number), mmap=True, weights_only=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.pt"
