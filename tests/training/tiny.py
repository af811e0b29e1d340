"""A generated task that trains in well under a second: how many steps ago was the marked symbol seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kruify.factors import parse
from kruify.layers.matrix import KroneckerMatrix
from kruify.tasks.base import Task, evaluating

Batch = tuple[Tensor, Tensor]


class Cell(nn.Module):
    """An Elman network or GRU written out, whose recurrent weight may be a KroneckerMatrix."""

    def __init__(self, inputs: int, hidden: int, outputs: int, gates: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.gates, self.hidden = gates, hidden
        self.weight_ih_l0 = nn.Linear(inputs, gates * hidden)
        self.weight_hh_l0: nn.Module = nn.Linear(hidden, gates * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, inputs) -> (batch, outputs)
        h = x.new_zeros(x.shape[0], self.hidden)
        projected = self.weight_ih_l0(x)
        for t in range(x.shape[1]):
            a, b = projected[:, t], self.weight_hh_l0(h)
            if self.gates == 1:
                h = torch.tanh(a + b)
            else:
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
                r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
                h = (1 - z) * torch.tanh(an + r * bn) + z * h
        return self.head(self.dropout(h))


class Delay(Task):
    metric, higher_is_better = "accuracy", True

    def __init__(
        self, batch: int = 16, count: int = 6, dropout: float = 0.0, dtype: torch.dtype = torch.float64, gates: int = 1
    ) -> None:
        self.batch, self.count, self.dropout, self.dtype, self.gates = batch, count, dropout, dtype, gates

    def model(self) -> nn.Module:
        return Cell(3, 8, 4, self.gates, self.dropout).to(self.dtype)

    def kronecker(self, spec: str = "2x2", seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = Cell(3, 8, 4, self.gates, self.dropout)
        model.weight_hh_l0 = KroneckerMatrix([parse(spec).resolve(8, 8)] * self.gates)
        return model.to(self.dtype)

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        examples = 2 * self.batch * self.count // 2
        x, y = self.data(examples, {"train": 1, "valid": 2, "test": 3}[split])
        order = torch.arange(examples)
        if split == "train":
            order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.batch):
            yield x[rows], y[rows]

    def data(self, examples: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(examples, 5, 3, generator=generator, dtype=self.dtype)
        y = torch.randint(4, (examples,), generator=generator)
        x[:, :, 0] = 0
        x[torch.arange(examples), y, 0] = 3
        return x, y

    def weight(self, batch: Batch) -> float:
        return float(len(batch[1]))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        right = total = 0
        loss = 0.0
        with evaluating(model):
            for batch in self.batches(split):
                outputs = self.forward(model, batch)
                loss += float(self.loss(outputs, batch)) * len(batch[1])
                right += int((outputs.argmax(-1) == batch[1]).sum())
                total += len(batch[1])
        return {"accuracy": right / total, "loss": loss / total}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Layered(nn.Module):
    """A recurrent layer of torch.nn, two deep, and a head."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.rnn = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[kind](3, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, inputs) -> (batch, outputs)
        return self.head(self.rnn(x)[0][:, -1])


class LayeredDelay(Delay):
    """Delay on torch.nn's own layers, so that it can be converted."""

    output_kind = "softmax"

    def __init__(self, kind: str = "gru", **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return Layered(self.kind, self.dtype)
