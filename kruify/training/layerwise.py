"""Layer-wise training without labels: each converted layer by itself learns to give what the dense one gave.

Layers are trained in the order in which the network runs them. A layer's inputs are those that the network gives it
with the converted layers before it, trained already; its targets are the outputs of the dense layer in the dense
network. Of what is recorded one batch in eight is held out and decides which weights are kept.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kruify.checkpoint import make_folder
from kruify.conversion.build import matrices_of
from kruify.errors import UsageError
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase
from kruify.progress import Progress
from kruify.tasks.base import evaluating, to_device
from kruify.training.digest import Digest, fingerprint
from kruify.training.fitting import VALIDATIONS, fit, kept_state, save_state
from kruify.training.pieces import PIECE, Call, Pieces, call_of, run
from kruify.training.randomness import derived_seed
from kruify.training.recurrent import recorded
from kruify.training.rounding import rounded_weights

STEPS, LR = 600, 4e-3
STEPS_OF_A_BATCH = 16 * PIECE
HELD_OUT = 8  # of so many batches in a row one is held out
GOLDEN = (math.sqrt(5) - 1) / 2
RECORDED = 4 << 30  # bytes of the files of a layer, beyond which no further batches are looked at


@dataclass(frozen=True)
class HealedLayer:
    """How one layer was trained.

    Attributes:
        error_before, error_after: ||output - dense output|| / ||dense output|| on held-out batches.
        steps: optimiser steps, 0 where there was nothing to learn.
        recorded: steps of sequences that were trained on.
    """

    name: str
    error_before: float
    error_after: float
    steps: int
    recorded: int


@dataclass(frozen=True)
class Healing:
    """What `heal` gives: the network, trained in place, and what became of its layers, in the order of training."""

    model: nn.Module
    layers: tuple[HealedLayer, ...]

    def to_json(self) -> dict[str, Any]:
        """All but the model."""
        return {"layers": [asdict(layer) for layer in self.layers]}


Calls = Iterable[tuple[bool, Call, Tensor]]
"""Whether it is held out, a call of the dense layer in the dense network, the input that the converted one gets."""


def heal(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Healing:
    """Trains every converted layer of `model`, in place, to give what that layer of `dense` gives; needs no labels.

        small, _ = kruify.convert(dense, budget="16x", dtype="int8")
        kruify.heal(small, dense, batches)

    Weights that are stored in fewer bits are rounded in the last quarter of each run, and at its end.

    Args:
        model: a converted copy of `dense`; both run on the device of their weights.
        batches: inputs of the network, gone through once for each layer: tensors, or tuples or dicts of arguments. An
            iterator is read into a list. One in eight is held out; they should come in one order each time.
        forward: runs a network on a batch; None for `network(batch)`, `network(*batch)`, `network(**batch)`.
        steps: of the optimiser, for each layer.
        resume: a folder for the state; layers that are finished there are not trained again. The batches are gone
            through once more, to tell that they are the same.

    Raises:
        UsageError: no converted layer is run, there are fewer than two batches, or `resume` holds another run or
            cannot be written to.
    """
    layers = {name: module for name, module in model.named_modules() if _is_converted(module)}
    for name in layers:
        if not isinstance(_submodule(dense, name), nn.RNNBase | nn.RNNCellBase):
            raise UsageError(f"the dense network has no recurrent layer '{name}'", "layer-wise training")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    call = forward or _forward
    if resume is not None:
        make_folder(resume)
    order = _in_order(dense, batches, call, layers)
    digest = Digest()
    for batch in batches if resume is not None else ():
        digest.add(batch)
    healed = []
    for number, name in enumerate(order):
        calls = _recorded(model, dense, name, batches, call)
        file = None if resume is None else Path(resume) / f"layer-{number + 1}.pt"
        told = within(progress, number, len(order))
        original = dense.get_submodule(name)
        found = train_layer(
            layers[name], original, name, calls, steps=steps, lr=lr, seed=seed, file=file, samples=digest.hex(),
            progress=told,
        )  # fmt: skip
        healed.append(found)
    return Healing(model, tuple(healed))


def train_layer(
    layer: nn.Module,
    dense: nn.Module,
    name: str,
    calls: Calls,
    *,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = 0,
    file: Path | None = None,
    samples: str = "",
    progress: Progress | None = None,
) -> HealedLayer:
    """Trains one converted layer, in place, to give what the dense one gives; the best held-out weights are kept.

    Args:
        file: for the trained weights; where it holds them already they are taken.
        samples: the digest of what `calls` come from.

    Raises:
        UsageError: nothing is held out, or nothing else; a call of it is not finite; `file` is of another run.
        CorruptError: `file` cannot be read.
    """
    settings = {"layer": name, "steps": steps, "lr": lr, "seed": seed, "samples": samples}
    settings["weights"] = fingerprint(layer.state_dict(), dense.state_dict())
    settings["held out"] = [number for number in range(HELD_OUT**2) if is_held_out(number)]  # the rule, by its results

    def go_on(kept: dict[str, Any]) -> HealedLayer:
        layer.load_state_dict(kept.pop("weights"))
        return HealedLayer(**kept)

    if file is not None and (done := kept_state(file, settings, go_on)) is not None:
        return done
    with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
        pieces = Pieces(dense, Path(folder))
        for held_out, original, given in calls:
            pieces.record(original, given if given.shape == original.input.shape else original.input, held_out=held_out)
            if pieces.bytes > RECORDED:
                break
        if not (pieces.train and pieces.held_out):
            what = "nothing" if not pieces.train else "no second batch, to be held out,"
            raise UsageError(f"{what} was recorded", f"layer '{name}'", "Give more batches, of at least one step each")
        if not pieces.finite:
            what = "it is called with NaN or infinite numbers, or gives such"
            raise UsageError(what, f"layer '{name}'", "Check the model and the data")
        found = _trained(layer, name, pieces, steps, lr, seed, progress)
    if file is not None:
        save_state(file, settings, {**asdict(found), "weights": layer.state_dict()})
    return found


def _trained(
    layer: nn.Module, name: str, pieces: Pieces, steps: int, lr: float, seed: int, progress: Progress | None
) -> HealedLayer:
    mean = sum(pieces.length(number) for number in pieces.train) / len(pieces.train)
    size = min(max(1, round(STEPS_OF_A_BATCH / mean)), len(pieces.train))
    shown = pieces.held_out[:: math.ceil(len(pieces.held_out) / (VALIDATIONS * size))]

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, "layer", name, step))
        drawn = torch.randint(len(pieces.train), (size,), generator=generator).tolist()
        call, target, counts = pieces.batch([pieces.train[number] for number in drawn])
        with _without_dropout(layer):
            wrong, whole = _squares(layer, call, target, counts)
        return wrong / whole

    before, after, done = fit(
        layer, loss, lambda: _held_out_error(layer, pieces, shown, size), f"layer {name}",
        steps=steps, lr=lr, progress=progress,
    )  # fmt: skip
    return HealedLayer(name, before, after, done, sum(pieces.length(number) for number in pieces.train))


def _squares(layer: nn.Module, call: Call, target: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the squares of errors and of targets, over the steps that count."""
    output, _ = run(layer, call)
    return ((output - target) * counts).square().sum(), (target * counts).square().sum().clamp_min(1e-12)


def _held_out_error(layer: nn.Module, pieces: Pieces, numbers: list[int], size: int) -> float:
    """Relative error with the weights as they are stored."""
    wrong = whole = 0.0
    with evaluating(layer), rounded_weights(layer):
        for start in range(0, len(numbers), size):
            found = _squares(layer, *pieces.batch(numbers[start : start + size]))
            wrong, whole = wrong + float(found[0]), whole + float(found[1])
    return math.sqrt(wrong / whole)


@contextmanager
def _without_dropout(layer: Any) -> Iterator[None]:
    """In training mode, which cuDNN's gradients need, and without the dropout between stacked layers."""
    mode, dropout = layer.training, getattr(layer, "dropout", 0.0)
    layer.train()
    layer.dropout = 0.0
    try:
        yield
    finally:
        layer.train(mode)
        layer.dropout = dropout


def within(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one of several equally long runs as progress of all."""
    if progress is None:
        return None
    return lambda done, total, phase: progress(number * total + done, count * total, f"{phase} ({number + 1}/{count})")


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, KRUBase | KRUCellBase) and bool(matrices_of(module))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _in_order(
    dense: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any], layers: Mapping[str, nn.Module]
) -> list[str]:
    """Names of the layers in the order in which the dense network first runs them; those that it does not run are
    left out."""
    order: dict[str, None] = {}
    handles = [
        dense.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in layers
    ]
    try:
        with evaluating(dense) as device:
            for batch in batches:
                forward(dense, to_device(batch, device))
                break
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise UsageError(
            "no converted layer is run" if layers else "the network has no converted layer",
            "layer-wise training",
            "Give batches that the network takes, and a network from kruify.convert",
        )
    return list(order)


def _recorded(
    model: nn.Module,
    dense: nn.Module,
    name: str,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
) -> Iterator[tuple[bool, Call, Tensor]]:
    """The calls of one layer in both networks."""
    layer = dense.get_submodule(name)
    for number, batch in enumerate(batches):
        with evaluating(dense) as device, recorded(dense, [name]) as originals:
            forward(dense, to_device(batch, device))
        with evaluating(model) as device, recorded(model, [name]) as givens:
            forward(model, to_device(batch, device))
        calls = [[call_of(layer, call.args, call.kwargs) for call in calls[name]] for calls in (originals, givens)]
        same = len(calls[0]) == len(calls[1])
        for original, given in zip(calls[0], calls[1] if same else calls[0], strict=True):
            yield is_held_out(number), original, given.input


def is_held_out(number: int) -> bool:
    """Whether batch `number`, counted from 0, is held out: of the first eight the second, of the next ones another.

    The place among the eight moves on by the golden ratio. Were it always the same, samples of which each fourth is of
    one kind, as they often come, would be held out of that kind alone: it would decide for all, and half of it be lost.
    """
    row, place = divmod(number, HELD_OUT)
    return place == int((1 + HELD_OUT * GOLDEN * row) % HELD_OUT)
