"""The gradient through time against states that are kept by hand; the measures of a training run."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kruify.analysis.conditioning import conditioning
from kruify.layers import KRU, KRUGRU
from kruify.tasks.base import Task
from kruify.training import Recipe, finetune
from kruify.training.parameter_groups import parameter_groups
from kruify.training.recurrent_conditioning import (
    POINTS,
    gradient_through_time,
    matrix_conditioning,
    recurrent_conditioning,
)

STEPS, BATCH = 6, 3


class Net(nn.Module):
    def __init__(self, rnn: nn.Module, outputs: int) -> None:
        super().__init__()
        self.rnn, self.dropout, self.out = rnn, nn.Dropout(0.5), nn.Linear(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.rnn(x)[0]))


class Sums(Task):
    def __init__(self, steps: int = STEPS, time_first: bool = False) -> None:
        self.steps, self.time_first = steps, time_first

    def model(self) -> nn.Module:
        raise NotImplementedError

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        shape = (self.steps, BATCH, 2) if self.time_first else (BATCH, self.steps, 2)
        for _ in range(2):
            yield torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        outputs: Tensor = model(batch)
        return outputs

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs.sum(-1) - batch.sum(-1).cumsum(0 if self.time_first else 1)).square().mean()


def by_hand(model: Net, x: Tensor, complex_state: bool, loss: Any) -> list[float]:
    """The norms of dL/dh_t of one layer that is called step by step."""
    states, outputs, state = [], [], None
    for t in range(x.shape[1]):
        _, state = model.rnn(x[:, t : t + 1], state)
        parts = torch.cat([state.real, state.imag], -1) if complex_state else state
        parts.retain_grad()
        states.append(parts)
        n = parts.shape[-1] // 2
        state = torch.complex(parts[..., :n], parts[..., n:]) if complex_state else parts
        outputs.append(parts[-1])
    loss(model.out(torch.stack(outputs, 1)), x).backward()
    return [float(state.grad.norm()) for state in states]


@pytest.mark.parametrize("kind", ["rnn", "gru", "kru-gru", "kru"])
def test_against_states_kept_by_hand(kind: str) -> None:
    layer: nn.Module = {
        "rnn": lambda: nn.RNN(2, 4, batch_first=True, dtype=torch.float64),
        "gru": lambda: nn.GRU(2, 4, batch_first=True, dtype=torch.float64),
        "kru-gru": lambda: KRUGRU(2, 4, batch_first=True, factors="2x2", dtype=torch.float64),
        "kru": lambda: KRU(2, 4, batch_first=True, factors="2x2", dtype=torch.float64),
    }[kind]()
    model = Net(layer, 8 if kind == "kru" else 4).double()
    task = Sums()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    drawn = torch.random.get_rng_state()
    found = gradient_through_time(model, task, 0)["rnn"]
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert model.dropout.training and all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(layer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    (x, _) = task.batches("train")
    assert found.steps == list(range(1, STEPS + 1))
    assert found.norms == pytest.approx(by_hand(model, x, kind == "kru", task.loss))


def test_long_sequences_are_measured_at_some_steps_and_unitary_ones_keep_the_gradient() -> None:
    """A linear unitary layer whose loss looks at the last step alone carries the whole gradient to every step."""

    class Last(Sums):
        def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
            return outputs[:, -1].square().mean()

    layer = KRU(2, 8, batch_first=True, factors="2x2", bias=False, dtype=torch.float64)
    found = gradient_through_time(Net(layer, 16).double(), Last(steps=100), 0)["rnn"]
    assert len(found.steps) == POINTS and found.steps[-1] == 100
    np.testing.assert_allclose(found.norms, found.norms[-1], rtol=1e-9)


def test_time_first_two_layers_lstm() -> None:
    model = Net(nn.LSTM(2, 4, num_layers=2, dtype=torch.float64), 4).double()
    found = gradient_through_time(model, Sums(time_first=True), 0)["rnn"]
    assert found.steps == list(range(1, STEPS + 1)) and min(found.norms) > 0


def test_layers_that_do_not_unroll_have_no_gradient_but_matrices() -> None:
    model = Net(nn.GRU(2, 4, bidirectional=True, batch_first=True, dtype=torch.float64), 8).double()
    found = recurrent_conditioning(model, Sums(), 0)
    assert found.gradient == {}
    assert [(m.name, m.gate) for m in found.matrices] == [
        (f"rnn.weight_hh_l0{suffix}", gate) for suffix in ("", "_reverse") for gate in "rzn"
    ]


def test_matrices_are_those_of_the_layers() -> None:
    model = Net(KRUGRU(2, 4, factors="2x2"), 4)
    dense = model.rnn.weight_hh_l0.to_dense().detach().double()
    for found, gate in zip(matrix_conditioning(model), dense.split(4), strict=True):
        expected = conditioning(gate)
        assert found.condition_number == pytest.approx(expected.condition_number, rel=1e-5)
        assert found.spectral_norm == pytest.approx(expected.spectral_norm, rel=1e-5)


def test_a_run_measures_at_every_validation_and_trains_the_same(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        torch.manual_seed(3)
        model = Net(KRU(2, 4, batch_first=True, factors="2x2", dtype=torch.float64), 8).double()
        return finetune(model, Sums(), epochs=2, lr=1e-2, device="cpu", **options)

    plain, watched = run(), run(conditioning=True, log_dir=tmp_path)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.history[0].conditioning is None and "conditioning" not in plain.history[0].to_json()
    assert len(watched.history) == 3
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, entry in zip(rows, watched.history, strict=True):
        (matrix,) = entry.conditioning.matrices
        for measure in ("condition_number", "spectral_norm", "unitarity_defect"):
            assert float(row[f"{measure} rnn.weight_hh_l0.h"]) == getattr(matrix, measure)
    assert float(rows[0]["condition_number rnn.weight_hh_l0.h"]) == pytest.approx(1)
    with (tmp_path / "gradient.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * STEPS
    assert [float(line["gradient_norm"]) for line in lines[-STEPS:]] == watched.history[-1].conditioning.gradient[
        "rnn"
    ].norms


def test_what_acts_at_every_step_has_a_learning_rate_of_its_own() -> None:
    model = Net(KRU(2, 4, num_layers=2, batch_first=True, factors="2x2"), 8)
    groups = parameter_groups(model, Recipe(factor_lr=0.01))
    names = {id(p): name for name, p in model.named_parameters()}
    slow = {names[id(p)] for group in groups if group["share"] == 0.01 for p in group["params"]}
    assert slow == {
        f"rnn.{name}_l{k}{end}"
        for k in (0, 1)
        for name, end in (("bias", ""), ("weight_hh", ".terms.0.factors.0"), ("weight_hh", ".terms.0.factors.1"))
    }
    assert sum(len(group["params"]) for group in groups) == len(names)
    groups = parameter_groups(model, Recipe(factor_lr=0.01, modrelu_lr=0.5))
    half = {names[id(p)] for group in groups if group["share"] == 0.5 for p in group["params"]}
    assert half == {"rnn.bias_l0", "rnn.bias_l1"}
