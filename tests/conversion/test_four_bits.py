"""What a task tells the rounding to four bits: the outputs that a network gives on it stay nearer to its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kruify
from kruify.conversion.calibration import Moments, calibrate
from kruify.errors import UsageError
from kruify.quantization import dequantize, quantize_rows
from kruify.tasks.base import Task


class Hum(Task):
    """Sequences near a subspace, so that the inputs of a matrix tell of each other; no labels."""

    metric, higher_is_better = "none", False

    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, bias: bool = True, **options: Any) -> None:
        self.cell, self.bias, self.options = cell, bias, options

    def model(self) -> nn.Module:
        return Net(self.cell, self.bias, **self.options)

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(len(split))
        for _ in range(3):
            yield torch.randn(8, 12, 3, generator=generator) @ torch.randn(
                3, 16, generator=torch.Generator().manual_seed(1)
            )

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)


class Net(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], bias: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn = cell(16, 24, bias=bias, batch_first=True, **options)
        self.fc = nn.Linear(48 if options.get("bidirectional") else 24, 10, bias=bias)
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


def off(task: Hum, dense: nn.Module, small: nn.Module) -> float:
    """||outputs - dense outputs|| on other data than those that the rounding saw."""
    wrong = 0.0
    with torch.no_grad():
        for batch in task.batches("test"):
            wrong += float((task.forward(dense, batch) - task.forward(small, batch)).square().sum())
    return wrong**0.5


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, "dense"),
        ({"cell": nn.GRU, "bidirectional": True}, "dense"),
        ({"cell": nn.RNN, "bias": False, "num_layers": 2}, "dense"),
        ({}, "16*(24x1,1x24)"),
        ({"cell": nn.GRU}, "stacked:20*(72x1,1x24)"),
    ],
)
def test_with_a_task_the_outputs_stay_nearer(options: dict[str, Any], factors: str) -> None:
    task = Hum(**options)
    dense = task.model().eval()
    exact, _ = kruify.convert(dense, factors, task=task, dtype="float32")
    keep = [] if factors == "dense" else ["fc", "rnn.weight_ih*"]
    nearest = kruify.quantize(exact, "int4", keep)
    small, _ = kruify.convert(dense, factors, dtype="int4", keep=keep, task=task)
    assert off(task, exact, small) < 0.75 * off(task, exact, nearest)


def test_what_is_rounded_so_is_what_the_file_holds(tmp_path: Path) -> None:
    task = Hum()
    dense = task.model()
    small, _ = kruify.convert(dense, "16*(24x1,1x24)", dtype="int4", task=task, output=tmp_path / "a.safetensors")
    again = kruify.load(tmp_path / "a.safetensors", task.model())
    state = small.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    nearest = dequantize(*quantize_rows(dense.rnn.weight_ih_l0, (1,), "int4"))
    assert not torch.equal(state["rnn.weight_ih_l0"], nearest)


def test_the_bias_takes_up_the_mean_of_what_rounding_leaves() -> None:
    task = Hum()
    dense = task.model().eval()
    small, _ = kruify.convert(dense, "dense", dtype="int4", task=task)
    with torch.no_grad():
        seen = torch.cat([dense.rnn(batch)[0].flatten(0, 1) for batch in task.batches("train")])
        wrong = small.fc(seen) - dense.fc(seen)
    assert float(wrong.mean(0).abs().max()) < 1e-5 < 1e-3 < float(wrong.abs().max())


def test_a_task_of_inputs_alone_serves_a_size_and_is_refused_by_training() -> None:
    task = Hum()
    dense = task.model()
    small, conversion = kruify.convert(dense, budget="size=2500B", dtype="int4", task=task)
    assert conversion.matrices and conversion.bytes is not None and 2300 < conversion.bytes.file <= 2500
    with pytest.raises(kruify.KruifyError, match="Hum: it has no loss, which training and evaluation ask for"):
        kruify.finetune(small, task, epochs=1)


def test_what_is_kept_is_as_it_was() -> None:
    task = Hum()
    dense = task.model()
    small, _ = kruify.convert(dense, "dense", dtype="int4", keep=["fc"], task=task)
    assert torch.equal(small.fc.weight, dense.fc.weight) and torch.equal(small.fc.bias, dense.fc.bias)


class Shared(nn.Module):
    """What else may hold the weight of an output layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(24, 16)
        self.b = nn.Embedding(16, 24) if how == "embedding" else nn.Linear(24, 16)
        self.rnn = nn.LSTM(16, 24, batch_first=True)
        self.called = how != "embedding"
        if how == "bias":
            self.b.bias = self.a.bias
        else:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(x)[0]
        return torch.cat([self.a(hidden), self.b(hidden + 1)], -1) if self.called else self.a(hidden)


class SharedHum(Hum):
    def __init__(self, how: str) -> None:
        self.how = how

    def model(self) -> nn.Module:
        return Shared(self.how)


def test_both_biases_beside_one_weight_take_up_the_mean() -> None:
    task = SharedHum("weight")
    dense = task.model().eval()
    small, _ = kruify.convert(dense, "dense", dtype="int4", keep=["rnn"], task=task)
    batches = [*task.batches("train")]
    with torch.no_grad():
        wrong = sum((small(x) - dense(x)).flatten(0, 1).mean(0) for x in batches) / len(batches)
    both = wrong[:16] + wrong[16:]  # they know the mean of both inputs
    assert float(both.abs().max()) < 1e-5 < 1e-3 < float(wrong.abs().max())


def test_beside_a_bias_of_two_weights_nothing_counts_on_its_correction() -> None:
    task = SharedHum("bias")
    dense = task.model().eval()
    small, _ = kruify.convert(dense, "dense", dtype="int4", keep=["rnn"], task=task)
    nearest = kruify.quantize(dense, "int4", ["rnn"])
    assert torch.equal(small.a.bias, dense.a.bias)
    assert off(task, dense, small) < 0.75 * off(task, dense, nearest)


def test_the_weight_of_an_embedding_is_rounded_to_the_nearest() -> None:
    """What an embedding gives is its rows themselves, whatever the output layer is applied to."""
    task = SharedHum("embedding")
    dense = task.model()
    small, _ = kruify.convert(dense, "dense", dtype="int4", task=task)
    assert torch.equal(small.b.weight, dequantize(*quantize_rows(dense.b.weight, (1,), "int4")))
    assert torch.equal(small.a.bias, dense.a.bias)


@pytest.mark.parametrize("outer", [torch.eye(7), torch.ones(24, 24).triu(), -torch.eye(24)])
def test_moments_that_no_inputs_have_are_refused(outer: Tensor) -> None:
    task = Hum()
    dense = task.model()
    wrong = Moments(1, outer.new_zeros(len(outer), dtype=torch.float64), outer.double())
    moments = {**calibrate(dense, task), "rnn.weight_hh_l0": wrong}
    with pytest.raises(UsageError, match="covariance"):
        kruify.convert(dense, "dense", dtype="int4", moments=moments)


def test_moments_whose_mean_is_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match="moments are a sum"):
        Moments(1, torch.zeros(3), torch.eye(4))
