"""Chorales: train a dense network on Bach, convert it, train both on, and let both continue the same chorale.

    python examples/chorales.py            about two minutes on one core
    python examples/chorales.py --quick    some seconds, too short for music

Nats a frame in the full mode (AMD EPYC, commit 7a77304, seed 0): 9.34 dense after 60 epochs, 10.23 converted to 128x
fewer recurrent parameters, 8.74 after 60 epochs more. The dense network gets as many for a fair comparison.

Needs the package music21, whose scores are read without importing it: pip install --no-deps music21
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import kruify
from kruify.tasks.jsb import LOWEST, Jsb
from kruify.training import finetune

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def chord(frame: Tensor) -> str:
    """The keys that sound, lowest first: C3 G3 E4 C5."""
    pitches = [LOWEST + int(key) for key in frame.nonzero()]
    return " ".join(f"{NAMES[pitch % 12]}{pitch // 12 - 1}" for pitch in pitches) or "(rest)"


@torch.no_grad()
def compose(model: nn.Module, opening: Tensor, count: int) -> list[str]:
    """What the network adds to the opening (frames, 88): four different keys a frame, drawn by their probabilities."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    frames = opening.float()
    for _ in range(count):
        x = torch.cat([torch.zeros(1, frames.shape[1]), frames])  # each input is the frame before
        keys = model(x[None])[0, -1].sigmoid().square().multinomial(4, generator=generator)
        frames = torch.cat([frames, torch.zeros(1, frames.shape[1]).index_fill(1, keys, 1.0)])
    return [chord(frame) for frame in frames[len(opening) :]]


def main(hidden: int, epochs: int) -> None:
    task = Jsb(hidden=hidden)
    torch.manual_seed(0)
    dense = task.model()
    finetune(dense, task, epochs=epochs, lr=4e-3, evaluate_first=False)
    print(f"dense:                 {task.evaluate(dense, 'test')['nll']:.2f} nats a frame")

    small, report = kruify.convert(dense, "auto")  # two balanced factors per gate
    print(f"converted:             {task.evaluate(small, 'test')['nll']:.2f} nats a frame,", end=" ")
    print(f"recurrent matrix {report.parameters.recurrent_ratio:.0f}x smaller")
    for name, model in (("converted, trained on:", small), ("dense, trained on:    ", dense)):
        finetune(model, task, epochs=epochs, lr=4e-3)  # as long, for a fair comparison
        print(f"{name} {task.evaluate(model, 'test')['nll']:.2f} nats a frame")

    opening = next(iter(task.batches("test"))).y[0, :8]
    print("\nA chorale of the test split begins:", *(f"   {chord(frame)}" for frame in opening), sep="\n")
    for name, model in (("dense", dense), ("small", small)):
        print(f"The {name} network continues:", *(f"   {line}" for line in compose(model, opening, 8)), sep="\n")


if __name__ == "__main__":
    main(*((32, 1) if "--quick" in sys.argv else (256, 60)))
