"""Budgets of time: real layers are timed here, and what is asserted holds whatever the machine is doing meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import kruify
from kruify.conversion.latency import LatencyPlan, TimedPlan, timed_plans
from kruify.conversion.locate import locate
from kruify.conversion.plan import Plan
from kruify.conversion.size import FileSize
from kruify.errors import TargetMissedError, UsageError


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fewest runs of each plan."""
    monkeypatch.setattr("kruify.conversion.latency.SECONDS", 0.0)
    yield


@pytest.fixture(scope="module")
def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.RNN(16, 24, bidirectional=True), "b": nn.GRU(48, 8)})


def test_what_keeps_the_most_of_what_is_fast_enough_is_chosen() -> None:
    timed = [TimedPlan(Plan(), *figures, False) for figures in ((3.0, 1.0), (1.0, 0.5), (0.9, 0.7), (0.5, 0.6))]
    assert LatencyPlan(3.0, 3.0, timed).chosen is timed[2]
    assert LatencyPlan(4.0, 3.0, timed).chosen is timed[3]
    assert LatencyPlan(1.0, 3.0, timed).chosen is timed[0]
    assert LatencyPlan(7.0, 3.0, timed).fast_enough == []


def kept(net: nn.Module, plan: Plan) -> float:
    """The share of the squared entries of W_hh that low rank of stacked gates keeps: by singular values."""
    ranks = {layer.full_name(weight): s.terms[0].rank for layer, weight, (s,) in plan.matrices()}
    names = ("a.weight_hh_l0", "b.weight_hh_l0")
    squares = {name: torch.linalg.svdvals(net.get_parameter(name).detach()).square() for name in names}
    return sum(float(s[: ranks.get(n)].sum()) for n, s in squares.items()) / sum(map(float, map(sum, squares.values())))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_plan_is_recorded_with_its_time_and_the_energy_it_keeps(net: nn.ModuleDict, dtype: str) -> None:
    file = FileSize(net.state_dict(), locate(net).layers, dtype)
    found = timed_plans(file, "latency=1.3x", skip=["*.weight_ih*", "a.*reverse"])
    assert len(found.timed) > 1 or found.fast_enough
    if found.fast_enough:
        data = found.to_json()
        assert (data["wanted"], data["batch"], data["steps"], data["threads"]) == (pytest.approx(1.3), 1, 64, 1)
        assert data["ratio"] == pytest.approx(data["dense_ms"] / data["ms"]) and data["ratio"] >= 1.3
        assert data["energy"] == max(c["energy"] for c in data["candidates"] if c["ratio"] >= 1.3)
        assert all(c["ms"] > 0 and c["ratio"] == pytest.approx(data["dense_ms"] / c["ms"]) for c in data["candidates"])
    for timed in found.timed:
        assert 0 <= timed.energy <= 1
        if timed.stacked:
            assert timed.energy == pytest.approx(kept(net, timed.plan), abs=1e-5)


def test_a_latency_out_of_reach_names_the_fastest_plan(net: nn.ModuleDict) -> None:
    told: list[tuple[float, float]] = []
    with pytest.raises(TargetMissedError, match=r"the fastest plan that was found takes [\d.]+x less time") as error:
        kruify.convert(
            net, budget="latency=100000x", only=["a"],
            progress=lambda done, total, phase: told.append((done, total)) if phase == "timing plans" else None,
        )  # fmt: skip
    assert "Allow latency=" in error.value.hint
    assert told == sorted(told) and told[-1] == (20, 20)  # also where searches end early


def test_tied_matrices_become_the_same_and_patterns_hold(net: nn.ModuleDict) -> None:
    tied = nn.ModuleDict({"a": nn.RNN(16, 16), "b": nn.RNN(16, 16)})
    tied["b"].weight_hh_l0 = tied["a"].weight_hh_l0
    file = FileSize(tied.state_dict(), locate(tied).layers, "float32")
    for plan in (timed.plan for timed in timed_plans(file, "latency=1.3x", skip=["*weight_ih*"]).timed):
        found = {layer.name: structures for layer, weight, structures in plan.matrices() if weight == "weight_hh_l0"}
        assert found.get("a") == found.get("b")
        assert not any("weight_ih" in weight for _, weight, _ in plan.matrices())


def test_a_latency_stands_alone(net: nn.ModuleDict) -> None:
    with pytest.raises(UsageError, match="covers all matrices"):
        kruify.convert(net, budget="latency=2x", input_budget="4x")
