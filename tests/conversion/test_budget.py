from __future__ import annotations

import pytest
import torch
from torch import nn

import kruify
from kruify.conversion.budget import Budget, parse_budget, plan_budget
from kruify.decomposition import fit, structure_search
from kruify.errors import PlanError, TargetMissedError
from kruify.factors import parse


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices():
    strong = torch.cat([gaussian(32, 2, seed=1) @ gaussian(2, 24, seed=2), 0.1 * gaussian(32, 24, seed=3)])
    return {"a": (strong, 2, None), "b": (gaussian(3 * 16, 16, seed=4), 3, None)}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("10x", Budget(0.1, None)),
        ("params=25%", Budget(0.25, None)),
        ("macs=10%", Budget(None, 0.1)),
        (" Params=8x, macs=50% ", Budget(0.125, 0.5)),
    ],
)
def test_budgets_are_read(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "size"),
    [("size=8x", 0.125), ("size=40%", 0.4), ("size=600kB", 600_000), ("size=1.5 MiB", 1_572_864), ("size=4096", 4096)],
)
def test_sizes_are_read(text, size):
    budget = parse_budget(text)
    assert budget == (Budget(size=size) if size < 1 else Budget(bytes=size))
    assert budget.of_file
    with pytest.raises(PlanError, match="of a whole network"):
        plan_budget(matrices(), text)


@pytest.mark.parametrize(
    "text", ["size=8x,macs=50%", "params=8x,size=600kB", "size=0.5x", "size=10TB", "latency=3x,2x", "latency=3ms"]
)
def test_what_is_no_size_is_named(text):
    with pytest.raises(PlanError, match=r"stands alone|not a reduction|not a budget"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["", "10", "0x", "0.5x", "200%", "bytes=10%", "10x,params=5%", "macs=0%"])
def test_what_is_no_budget_is_named(text):
    with pytest.raises(PlanError):
        parse_budget(text)


@pytest.mark.parametrize("budget", ["3x", "macs=30%", "2x,macs=30%"])
def test_the_plan_keeps_within_the_budget_and_is_the_same_again(budget):
    plan, limits = plan_budget(matrices(), budget), parse_budget(budget)
    if limits.parameters is not None:
        assert plan.parameters <= limits.parameters * plan.dense_parameters
    if limits.multiply_adds is not None:
        assert plan.multiply_adds <= limits.multiply_adds * plan.dense_parameters
    assert {n: sum(s.gates for s in found) for n, found in plan.structures.items()} == {"a": 2, "b": 3}
    assert plan.parameters == sum(s.parameters for gates in plan.structures.values() for s in gates)
    assert plan_budget(matrices(), budget) == plan
    for name, (weight, _, _) in matrices().items():
        found = plan.structures[name]
        for w, s, energy in zip(weight.chunk(len(found)), found, plan.energy[name], strict=True):
            assert parse(str(s)).resolve(s.rows, s.cols, s.gates) == s
            assert fit(w, s).energy >= energy - 1e-6


def test_what_one_budget_learnt_serves_the_next_and_changes_nothing(monkeypatch):
    budgets = ("4x", "8x")
    alone = [plan_budget(matrices(), budget) for budget in budgets]
    fits = []
    backfit = structure_search.backfit
    monkeypatch.setattr(structure_search, "backfit", lambda *a: fits.append(a) or backfit(*a))
    searches = {}
    for budget, wanted in zip(budgets, alone, strict=True):
        assert plan_budget(matrices(), budget, searches=searches) == wanted
    assert set(searches) == {("a", 0), ("a", 1), ("a", -1), ("b", 0), ("b", 1), ("b", 2), ("b", -1)}
    shared = len(fits)
    for budget in budgets:
        plan_budget(matrices(), budget)
    assert 0 < shared < len(fits) - shared


def total_energy(plan):
    lost = 0.0
    for name, (weight, _, _) in matrices().items():
        for w, s in zip(weight.chunk(len(plan[name])), plan[name], strict=True):
            lost += float((w - fit(w, s).to_dense()).square().sum())
    return 1 - lost / sum(float(w.square().sum()) for w, _, _ in matrices().values())


@pytest.mark.parametrize(("share", "uniform"), [(0.25, {"a": "3*(32x1,1x24)", "b": "2*(16x1,1x16)"})])
def test_a_plan_keeps_more_than_an_even_share_of_low_rank(share, uniform):
    plan = plan_budget(matrices(), f"params={100 * share}%")
    even = {
        n: [parse(s).resolve(matrices()[n][0].shape[0] // g, matrices()[n][0].shape[1])] * g
        for (n, s), g in zip(uniform.items(), (2, 3), strict=True)
    }
    assert sum(s.parameters for gates in even.values() for s in gates) <= share * plan.dense_parameters
    assert total_energy(plan.structures) > total_energy(even)


def test_multiply_adds_rule_out_what_parameters_allow():
    w = sum(torch.kron(gaussian(4, 4, seed=i), gaussian(4, 4, seed=i + 9)) for i in range(4))
    free = plan_budget({"w": (w, 1, None)}, "params=50%").structures["w"][0]
    bound = plan_budget({"w": (w, 1, None)}, "params=50%,macs=60%").structures["w"][0]
    assert free.multiply_adds > 0.6 * 256 >= bound.multiply_adds


@pytest.mark.parametrize("bound", [0.5, 0.1])
def test_an_error_bound_alone_is_kept_by_every_gate(bound):
    plan = plan_budget(matrices(), None, max_error=bound)
    for name, (weight, gates, _) in matrices().items():
        for w, s in zip(weight.chunk(gates), plan.structures[name], strict=True):
            assert fit(w, s).relative_error <= bound + 1e-6
    assert plan.structures["a"][0].parameters < 32 * 24 / 2  # of rank two


def test_weighted_plans_look_at_the_output():
    w, h = gaussian(16, 16), torch.zeros(16, 16, dtype=torch.float64)
    h[3, 3] = 1.0
    plan = plan_budget({"w": (w, 1, h)}, "8x")
    assert plan.energy["w"][0] > 0.999  # only one column is ever used


def test_what_cannot_be_planned_is_named():
    with pytest.raises(PlanError, match="no matrix"):
        plan_budget({}, "10x")
    with pytest.raises(PlanError, match="budget"):
        plan_budget(matrices(), None)
    with pytest.raises(PlanError, match="smallest"):
        plan_budget(matrices(), "1000x")
    with pytest.raises(PlanError, match="gates"):
        plan_budget({"w": (gaussian(16, 16), 3, None)}, "2x")
    with pytest.raises(TargetMissedError, match=r"[ab]:"):
        plan_budget(matrices(), "10x", max_error=0.01)


def test_progress_counts_gates():
    seen = []
    plan_budget(matrices(), "4x", progress=lambda done, total, phase: seen.append((done, total)))
    assert seen == sorted(set(seen)) and seen[:6] == [(i, 7) for i in range(6)]  # five gates and two stacks,
    assert seen[-1] == (7, 7)  # which may be passed over


@pytest.mark.parametrize(("rows", "cols"), [(50, 50), (257, 257), (26, 65), (1, 7), (7, 1)])
def test_sizes_without_handsome_divisors_are_planned_too(rows, cols):
    plan = plan_budget({"w": (gaussian(rows, cols), 1, None)}, "params=60%" if min(rows, cols) > 1 else "1x")
    assert plan.parameters <= plan.dense_parameters
    structure = parse("auto").resolve(rows, cols)
    assert 0 < fit(gaussian(rows, cols), structure).energy <= 1 + 1e-12


def common_inputs(gates=3):
    """Gates that read the same two directions of h, and write wherever they like."""
    return gaussian(gates * 24, 2, seed=5) @ gaussian(2, 24, seed=6)


def test_gates_with_something_in_common_are_stacked():
    plan = plan_budget({"w": (common_inputs(), 3, None)}, "params=12%")
    (structure,) = plan.structures["w"]
    assert structure.gates == 3 and plan.energy["w"][0] > 0.999  # gate by gate rank 2 takes 17 %
    assert fit(common_inputs(), structure).energy > 0.999


def test_gates_of_which_one_is_set_apart_are_not():
    layer = nn.GRU(24, 24)
    layer.weight_hh_l0.data = common_inputs().float()
    factors = {}
    for overrides in ({}, {"weight_hh_l0.z": "dense"}):
        plan = kruify.convert(layer, budget="params=12%", overrides=overrides)[1].plan
        factors[len(overrides)] = [str(s) for s in plan.structures()["weight_hh_l0"]]
    assert factors[0][0].startswith("stacked:") and len(factors[0]) == 1
    assert factors[1][1] == "24x24" and len(factors[1]) == 3 and "stacked" not in "".join(factors[1])


def test_gates_without_anything_in_common_are_not():
    apart = torch.cat([gaussian(24, 2, seed=i) @ gaussian(2, 24, seed=i + 9) for i in range(3)])
    plan = plan_budget({"w": (apart, 3, None)}, "params=17%")
    assert len(plan.structures["w"]) == 3 and min(plan.energy["w"]) > 0.999


def test_every_gate_keeps_an_error_bound_so_that_it_is_not_given_to_a_stack():
    plan = plan_budget({"w": (common_inputs(), 3, None)}, "params=50%", max_error=0.1)
    assert len(plan.structures["w"]) == 3


@pytest.mark.parametrize("kind", ["zero", "blocks"])
@pytest.mark.parametrize("budget", ["4x", "size=4x"])
def test_matrices_without_a_spectrum_to_speak_of_are_planned(kind: str, budget: str) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.block_diag(*[torch.randn(8, 8, generator=generator) for _ in range(8)])
    net = torch.nn.RNN(16, 64)
    with torch.no_grad():
        net.weight_hh_l0.copy_(blocks if kind == "blocks" else 0 * blocks)
    _, report = kruify.convert(net, budget=budget)
    (found,) = [matrix for matrix in report.matrices if matrix.name == "weight_hh_l0"]
    assert found.energy > 0.5 and found.parameters_after < 64 * 64
