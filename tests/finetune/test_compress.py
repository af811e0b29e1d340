from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LayeredDelay, same
from torch import Tensor, nn

from kruify.convert import plan_of
from kruify.errors import UsageError
from kruify.finetune.compress import (
    Round,
    compress,
    layer_errors,
    low_rank_and_sparse,
    next_student,
    plan_for,
    relative_drop,
)
from kruify.finetune.recurrent import recurrent_layers
from kruify.layers.matrix import KroneckerMatrix
from kruify.locate import locate

QUICK: dict[str, Any] = {"epochs": 1, "lr": 5e-3, "device": "cpu"}


class Pair(nn.Module):
    """Two recurrent layers, the second of which does all the work."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(3, 8, batch_first=True)
        self.second = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0][:, -1])


class PairDelay(LayeredDelay):
    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = Pair().to(self.dtype)
        with torch.no_grad():
            model.second.weight_hh_l0.mul_(3)
            model.first.weight_hh_l0.mul_(0.01)
        return model


class Strict(PairDelay):
    """Nothing but dense matrices is good enough, until `layers` of them are dense again."""

    def __init__(self, demand: int) -> None:
        super().__init__(count=2)
        self.demand = demand

    metric, higher_is_better = "error", False

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        kept = sum(m.terms[0].term.rank for m in model.modules() if isinstance(m, KroneckerMatrix))
        converted = sum(isinstance(m, KroneckerMatrix) for m in model.modules())
        return {"error": 1.0 + max(0, self.demand - kept - 8 * (2 - converted))}


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4])
def test_default_structure_keeps_its_share(share: float) -> None:
    layers = locate(nn.GRU(64, 64)).layers
    plan = plan_for(layers, {"": share}, low_rank_and_sparse)
    ((_, _, structures),) = plan.matrices()
    assert sum(s.parameters for s in structures) == pytest.approx(3 * 64 * 64 * share, rel=0.02)
    assert not plan_for(layers, {"": 1.0}, low_rank_and_sparse).layers


@pytest.mark.parametrize(
    ("value", "dense", "higher", "expected"),
    [
        (0.44, 0.4, False, 0.1),
        (0.36, 0.4, True, 0.1),
        (0.5, 0.4, True, -0.25),
        (-2.0, -4.0, False, 0.5),
        (1, 0, False, 1),
    ],
)
def test_relative_drop(value: float, dense: float, higher: bool, expected: float) -> None:
    assert relative_drop(value, dense, higher) == pytest.approx(expected)


def test_within_the_contract_at_once() -> None:
    task = PairDelay(count=2)
    model = task.model()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, task, 4, max_drop=100.0, **QUICK)
    assert result.reached and len(result.rounds) == 1
    assert task.evaluate(result.model, "valid") == result.metrics
    assert [item.layer.name for item in result.plan.layers] == ["first", "second"]
    assert same(model.state_dict(), before)


def test_the_worst_layer_gets_more() -> None:
    task, seen = Strict(demand=4), list[Round]()
    model = task.model()
    result = compress(model, task, 8, max_drop=0.0, max_rounds=5, on_round=seen.append, **QUICK)
    assert seen == result.rounds
    first, second = result.rounds[:2]
    assert first.layer_errors["second"] > first.layer_errors["first"]
    assert first.shares == {"first": 1 / 8, "second": 1 / 8}
    assert second.shares == {"first": 1 / 8, "second": 1 / 4}
    assert result.reached and result.drop == 0
    assert result.rounds[-1].shares["second"] == 1.0 and result.rounds[-1].shares["first"] == 1 / 8
    assert [item.layer.name for item in result.plan.layers] == ["first"]
    assert isinstance(recurrent_layers(result.model)["second"], nn.GRU)


def test_untouched_layers_go_on_from_where_they_were() -> None:
    task = PairDelay()
    model = task.model()
    layers = locate(model).layers
    previous = next_student(model, plan_for(layers, {"first": 1 / 8, "second": 1 / 8}, low_rank_and_sparse), None, "")
    with torch.no_grad():
        for parameter in previous.parameters():
            parameter.add_(1)
    plan = plan_for(layers, {"first": 1 / 8, "second": 1 / 4}, low_rank_and_sparse)
    student, fresh = next_student(model, plan, previous, "second"), next_student(model, plan, None, "")
    for part in ("first", "head"):
        assert same(student.get_submodule(part).state_dict(), previous.get_submodule(part).state_dict())
    assert same(student.second.state_dict(), fresh.second.state_dict())
    assert plan_of(student).to_json() == plan.to_json()


def test_resumed_rounds_are_the_same(tmp_path: Path) -> None:
    task = Strict(demand=99)
    model = task.model()
    whole = compress(model, task, 8, max_drop=0.0, max_rounds=3, **QUICK)
    compress(model, task, 8, max_drop=0.0, max_rounds=2, resume=tmp_path, **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-1", "round-2"]
    again = compress(model, task, 8, max_drop=0.0, max_rounds=3, resume=tmp_path, **QUICK)
    assert again.rounds == whole.rounds
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_layer_errors_are_zero_for_the_teacher_itself() -> None:
    task = PairDelay(count=2)
    model = task.model()
    student = compress(model, task, 4, max_drop=100.0, **QUICK).model
    assert set(layer_errors(student, model, task)) == {"first", "second"}
    assert layer_errors(model, model, task) == {}
    assert min(layer_errors(student, model, task).values()) > 0


def test_senseless_requests() -> None:
    task = PairDelay(count=2)
    with pytest.raises(UsageError, match="budget of 1x"):
        compress(task.model(), task, 1)
    with pytest.raises(UsageError, match="no RNN"):
        compress(nn.Linear(2, 2), task, 4)
