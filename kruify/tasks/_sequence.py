"""One recurrent layer between inputs and predictions: the network of most built-in tasks, and their options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.tasks._cells import last_output, output_size, recurrent
from kruify.tasks.base import Task, check_split, evaluating, to_device


class SequenceNetwork(nn.Module):
    """A recurrent layer `rnn` and a linear layer `fc`.

    Args:
        inputs: features of an input step; with one_hot the number of symbols.
        outputs: predictions of one step.
        one_hot: inputs are int64 symbols and become one-hot vectors.
        last: predict once, after the last step, instead of at every step.
    """

    def __init__(self, inputs: int, outputs: int, options: SequenceTask, *, one_hot: bool = False, last: bool = False):
        super().__init__()
        self.inputs, self.one_hot, self.last = inputs, one_hot, last
        self.rnn = recurrent(
            options.cell,
            inputs,
            options.hidden,
            factors=options.factors,
            start=options.start,
            num_layers=options.layers,
            dropout=options.dropout if options.layers > 1 else 0.0,  # torch warns where it would act on nothing
            batch_first=True,
        )
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(output_size(self.rnn), outputs)

    def forward(
        self,
        x: Tensor,  # (batch, steps, inputs), or (batch, steps) int64 with one_hot
    ) -> Tensor:  # (batch, steps, outputs), or (batch, outputs) with last
        return self.run(x, None)[0]

    def run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the predictions and the state behind the last step, given the one before the first."""
        if self.one_hot:
            weight: object = self.fc.weight  # a method where the network is quantised to int8
            dtype = weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()
            x = functional.one_hot(x, self.inputs).to(dtype)
        outputs, state = self.rnn(x, state)
        if self.last:
            outputs = last_output(state)
        return self.fc(self.dropout(outputs)), state


class Batch(NamedTuple):
    """What goes in, what should come out, and where that counts."""

    x: Tensor  # (batch, steps, ...)
    y: Tensor  # (batch, ...) or (batch, steps, ...); a class below 0 does not count
    mask: Tensor | None = None  # (batch, steps) bool; None: everywhere


@dataclass(eq=False)
class SequenceTask(Task):
    """Options that these tasks share; each overrides the defaults that suit it.

    Args:
        hidden: hidden size.
        cell: "lstm", "gru", "rnn", "kru-" and one of them, or the unit itself: "kru" (complex), "kru-real".
        factors: factor spec of a kru cell.
        start: how the weights of a "kru" or "kru-real" begin, "linear" or "small" (kruify.layers.KRU).
        layers: recurrent layers.
        dropout: on the outputs of every recurrent layer.
        batch_size: examples in a training batch.
    """

    hidden: int = 128
    cell: str = "lstm"
    factors: str = "auto"
    start: str = "linear"
    layers: int = 1
    dropout: float = 0.0
    batch_size: int = 64

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return cast(Tensor, model(batch.x))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy in nats of the classes in y."""
        return functional.cross_entropy(outputs.flatten(0, -2), batch.y.flatten(), ignore_index=-1)

    def weight(self, batch: Batch) -> float:
        """Return the number of sequences in the batch; where they differ in length, of frames that count."""
        return float(len(batch.x) if batch.mask is None else batch.mask.sum())

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        """Return the metrics of one batch, each summed over its sequences or frames: by default the loss."""
        return {self.metric: float(self.loss(outputs, batch)) * self.weight(batch)}

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the mean over all sequences or frames of what `metrics` sums."""
        sums: dict[str, float] = {}
        count = 0.0
        with evaluating(model) as device:
            for batch in self.batches(split):
                batch = to_device(batch, device)
                for name, value in self.metrics(self.forward(model, batch), batch).items():
                    sums[name] = sums.get(name, 0.0) + value
                count += self.weight(batch)
        return {name: value / count for name, value in sums.items()}

    def parts(self, count: int, split: str, seed: int, size: int) -> Iterable[Tensor]:
        """Return the numbers below `count` in batches: shuffled for "train", else in order, `size` at a time."""
        if split == "train":
            return shuffled(count, self.batch_size, seed)
        return torch.split(torch.arange(count), size)


@dataclass(eq=False)
class GeneratedTask(SequenceTask):
    """Sequences that are drawn: "train" anew for every seed, the other splits always from the same.

    Args:
        train_examples: freshly drawn sequences in an epoch.
    """

    train_examples: int = 6400
    cell: str = "rnn"

    drawn: ClassVar[dict[str, tuple[int, int]]]
    """Split -> number of sequences, seed."""
    evaluation_batch: ClassVar[int]

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, *, train: bool) -> Batch:
        """Return the next batch, of `count` sequences."""

    def examples(self, split: str) -> int:
        return self.train_examples if check_split(split) == "train" else self.drawn[split][0]

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        count, train = self.examples(split), split == "train"
        generator = torch.Generator().manual_seed(seed if train else self.drawn[split][1])
        size = self.batch_size if train else self.evaluation_batch
        for start in range(0, count, size):
            yield self.draw(min(size, count - start), generator, train=train)


def accuracy(outputs: Tensor, batch: Batch) -> dict[str, float]:
    """Return how many of the classes in y are the likeliest, as `SequenceTask.metrics`."""
    return {"accuracy": int((outputs.argmax(-1) == batch.y).sum())}


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the numbers below `count` in an order that follows from `seed`, `size` at a time."""
    generator = torch.Generator().manual_seed(seed)
    yield from torch.split(torch.randperm(count, generator=generator), size)
