"""Relabelled units from the search to files, plans, calibration and fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kruify
from kruify.analysis.costs import gate_matrices, layers_of
from kruify.analysis.verify import verify
from kruify.checkpoint import metadata_for, write_safetensors
from kruify.conversion import convert_module, convert_tensors, densify_tensors, plan_of, swap
from kruify.conversion.locate import Located, describe, locate
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.relabel import relabel_plan
from kruify.errors import CorruptError, PlanError, UnsupportedError, UsageError
from kruify.reporting import build_report, to_html, to_markdown
from kruify.tasks.base import Task
from kruify.training import finetune
from kruify.training.distill import Distillation
from kruify.training.recipe import Recipe

F64 = torch.float64
ORDER = [7, 1, 2, 3, 4, 5, 6, 0]


class Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = layer if layer is not None else nn.GRU(3, 8, dtype=F64)
        self.out = nn.Linear(8, 2, dtype=F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.rnn(x)[0])
        return out


class Sums(Task):
    metric = "loss"

    def model(self) -> nn.Module:
        return Net()

    def batches(self, split: str, *, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed if split == "train" else 1000)
        for _ in range(4):
            yield torch.randn(6, 5, 3, dtype=F64, generator=generator)

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch)
        return out

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (outputs - batch[..., :2].cumsum(0)).square().mean()


def planted() -> Net:
    """A GRU whose recurrent matrices are Kronecker products but for two units that have changed places."""
    net = Net()
    with torch.no_grad():
        gates = torch.stack([torch.kron(torch.randn(4, 4, dtype=F64), torch.randn(2, 2, dtype=F64)) / 3 for _ in "rzn"])
        net.rnn.weight_hh_l0.copy_(gates[:, ORDER][:, :, ORDER].reshape(24, 8))
    return net


def with_units(net: nn.Module, spec: str, inputs: str | None = None) -> Plan:
    """A plan in which every recurrent matrix has random units."""
    layers = []
    for item in make_plan(locate(net).layers, spec, inputs).layers:
        hidden = item.layer.hidden_size
        units = {
            weight: tuple(((torch.randperm(hidden) + 1) * (2 * torch.randint(2, (hidden,)) - 1)).tolist())
            for weight in item.matrices
            if weight.startswith("weight_hh")
        }
        layers.append(replace(item, relabelled=units))
    return Plan(layers)


def test_the_search_finds_the_order_that_was_planted_and_the_layer_keeps_its_function() -> None:
    net = planted()
    plain, _ = kruify.convert(net, "4x4,2x2")
    found, account = kruify.convert(net, "4x4,2x2", relabel=True, relabel_seconds=60)
    (row,) = account.relabelled
    assert row.energy_after == pytest.approx(1, abs=1e-9) and row.energy_after > row.energy_before
    assert row.gain == pytest.approx(row.energy_after - row.energy_before - (row.null_after - row.null_before))
    assert (row.name, row.layer) == ("rnn.weight_hh_l0", "rnn") and 2 <= row.moved <= 8
    x = torch.randn(9, 4, 3, dtype=F64)
    torch.testing.assert_close(found(x), net(x), rtol=0, atol=1e-9)
    assert not torch.allclose(plain(x), net(x), atol=1e-3)
    again, _ = kruify.convert(net, "4x4,2x2", relabel=True, relabel_seconds=60)
    assert torch.equal(again.rnn.relabel_l0.permutation, found.rnn.relabel_l0.permutation)
    assert account.parameters["total_after"] == sum(p.numel() for p in found.parameters())


def test_where_nothing_is_gained_nothing_is_relabelled() -> None:
    converted, account = kruify.convert(Net(), "8x8", relabel=True)
    (row,) = account.relabelled
    assert (row.moved, row.flipped, row.gain) == (0, 0, 0.0)
    assert not any("relabel" in name for name in converted.state_dict())


@pytest.mark.parametrize("kind", ["projected", "relu"])
def test_every_direction_is_searched_within_what_is_legal(kind: str) -> None:
    layer = nn.RNN(3, 12, nonlinearity="relu") if kind == "relu" else nn.LSTM(3, 8, 2, bidirectional=True, proj_size=4)
    seen: list[str] = []
    plan = make_plan([describe("", layer)], "auto")
    found, searched = relabel_plan(
        plan, layer.state_dict(), seconds=20, progress=lambda gone, total, text: seen.append(text)
    )
    assert list(searched) == [weight for weight in plan.layers[0].matrices]
    assert {text.split(":")[0] for text in seen} == {f"relabelling {weight}" for weight in searched}
    assert found.layers[0].relabelled
    if isinstance(layer, nn.RNN):
        assert min(min(units) for units in found.layers[0].relabelled.values()) > 0
    x = torch.randn(5, 2, 3)
    full, _ = convert_module(layer, Plan([replace(found.layers[0], matrices=make_full(plan).layers[0].matrices)]))
    torch.testing.assert_close(full(x), layer(x), rtol=0, atol=1e-5)


def make_full(plan: Plan) -> Plan:
    """The same matrices, each one full-size factor."""
    sizes = {weight: structures[0] for _, weight, structures in plan.matrices()}
    specs = {weight: f"{s.rows}x{s.cols}" for weight, s in sizes.items()}
    return make_plan([plan.layers[0].layer], "auto", overrides=specs)


def test_files_and_the_way_back_to_dense(tmp_path: Path) -> None:
    net = nn.LSTM(3, 8, 2, bidirectional=True, dtype=F64)
    plan = with_units(net, "2*(4x2,2x4)+diag", "auto")
    converted, account = convert_module(net, plan)
    from_tensors = convert_tensors(net.state_dict(), plan, locate(net.state_dict()))
    torch.testing.assert_close(from_tensors.tensors, dict(converted.state_dict()), rtol=0, atol=0)
    names = list(from_tensors.tensors)
    assert names.index("relabel_l1.signs") == names.index("relabel_l1.permutation") + 1
    assert names.index("weight_ih_l1.terms.0.factors.0") < names.index("relabel_l1.signs") < names.index("bias_ih_l1")
    assert [row.name for row in account.relabelled] == [w for w in plan.layers[0].matrices if "_hh_" in w]
    assert all(row.energy_before is None and row.moved for row in account.relabelled)
    path = tmp_path / "net.kru.safetensors"
    kruify.save(converted, path)
    loaded = kruify.load(path, into=nn.LSTM(3, 8, 2, bidirectional=True, dtype=F64))
    x = torch.randn(6, 2, 3, dtype=F64)
    torch.testing.assert_close(loaded(x), converted(x), rtol=0, atol=0)
    assert kruify.load(path, into=converted) is converted
    torch.testing.assert_close(kruify.load(path)[""](x), converted(x), rtol=0, atol=0)
    assert kruify.inspect(path).plan == plan_of(converted)
    assert plan_of(converted).layers[0].relabelled == plan.layers[0].relabelled
    dense = kruify.densify(converted)
    assert type(dense) is nn.LSTM
    converted.backend = "reference"
    torch.testing.assert_close(dense(x), converted(x), rtol=0, atol=1e-12)
    back = densify_tensors(converted.state_dict(), plan)
    torch.testing.assert_close(back, dict(dense.state_dict()), rtol=0, atol=1e-12)
    assert set(back) == set(net.state_dict())
    assert any("differs" in check.detail for check in verify(path))
    layers = layers_of(kruify.checkpoint.read(path))
    for name, gate, matrix, _ in gate_matrices(layers):
        place = "ifgo".index(gate) * 8
        torch.testing.assert_close(matrix, getattr(dense, name).detach()[place : place + 8], rtol=0, atol=1e-12)


def test_a_report_says_so_and_measures_energy_in_the_dense_order(tmp_path: Path) -> None:
    net = nn.GRU(3, 8, dtype=F64)
    plan = with_units(net, "2*(4x2,2x4)")
    converted, account = convert_module(net, plan)
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    kruify.save(converted, tmp_path / "small.kru.safetensors")
    report = build_report([tmp_path / "dense.pt", tmp_path / "small.kru.safetensors"], latency_seconds=0.0)
    dense, small = (model.recurrent_matrices for model in report.models)
    assert [entry.relabelled for entry in dense + small] == [False] * 3 + [True] * 3
    for entry, gate in zip(small, account.matrices, strict=True):
        assert entry.energy == pytest.approx(gate.energy)
    assert "2*(4x2,2x4), relabelled" in to_markdown(report) and "2*(4x2,2x4), relabelled" in to_html(report)


def test_a_file_whose_order_is_not_the_plans_is_corrupt(tmp_path: Path) -> None:
    net = nn.GRU(3, 8)
    plan = with_units(net, "auto")
    converted, _ = convert_module(net, plan)
    tensors = dict(converted.state_dict())
    tensors["relabel_l0.permutation"] = tensors["relabel_l0.permutation"].roll(1)
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata_for(plan.to_json()))
    with pytest.raises(CorruptError, match="not in the order of the plan"):
        verify(tmp_path / "x.safetensors")
    tensors["relabel_l0.permutation"] = torch.full((8,), 99)
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata_for(plan.to_json()))
    with pytest.raises(CorruptError, match="no relabelling"):
        kruify.load(tmp_path / "x.safetensors", into=nn.GRU(3, 8))
    del tensors["relabel_l0.permutation"]
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata_for(plan.to_json()))
    with pytest.raises(CorruptError, match="permutation"):
        kruify.load(tmp_path / "x.safetensors")


def test_the_plan_carries_it() -> None:
    net = nn.ModuleDict({"a": nn.LSTM(3, 8, bidirectional=True), "b": nn.RNN(3, 4)})
    plan = with_units(net, "auto")
    text = plan.to_json(indent=2)
    assert Plan.from_json(text) == plan
    data = json.loads(text)
    assert data["schema"] == 2
    units = data["layers"][0]["matrices"]["weight_hh_l0_reverse"]["units"]
    assert tuple(map(int, units.split())) == plan.layers[0].relabelled["weight_hh_l0_reverse"]
    plain = make_plan(locate(net).layers, "auto")
    assert json.loads(plain.to_json())["schema"] == 1 and "units" not in plain.to_json()
    same, searched = relabel_plan(plan, net.state_dict())  # what is planned already is kept
    assert same == plan and searched == {}


@pytest.mark.parametrize(
    ("layer", "weight", "units", "words"),
    [
        (nn.GRU(3, 4), "weight_hh_l0", "1 2 3", "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_hh_l0", "1 2 3 3", "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_hh_l0", "0 1 2 3", "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_hh_l0", "1 2 3 4.5", "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_hh_l0", "1 2 3 " + "4" * 5000, "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_hh_l0", [1, 2, 3, 4], "each of the units 1 to 4 once"),
        (nn.GRU(3, 4), "weight_ih_l0", "1 2 3 4", "only recurrent matrices"),
        (nn.RNN(3, 4, nonlinearity="relu"), "weight_hh_l0", "1 -2 3 4", "change signs"),
    ],
)
def test_edited_units_are_checked(layer: nn.Module, weight: str, units: Any, words: str) -> None:
    data = json.loads(make_plan([describe("rnn", layer)], "auto", "auto").to_json())
    data["schema"] = 2
    data["layers"][0]["matrices"][weight]["units"] = units
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps(data))
    data["schema"] = 4
    with pytest.raises(UnsupportedError, match="newer"):
        Plan.from_json(json.dumps(data))


def test_signs_are_refused_by_a_model_that_is_not_tanh() -> None:
    item = make_plan([describe("", nn.RNN(3, 4))], "auto").layers[0]
    plan = Plan([replace(item, relabelled={"weight_hh_l0": (1, -2, 3, 4)})])
    with pytest.raises(PlanError, match="change signs"):
        swap(nn.RNN(3, 4, nonlinearity="relu"), plan)
    unknown = Located([replace(item.layer, nonlinearity=None)], [])  # of a state dict: the plan knows better
    assert convert_tensors(nn.RNN(3, 4).state_dict(), plan, unknown).relabelled[0].flipped == 1


def test_a_swapped_layer_has_its_dense_weights_in_the_new_order() -> None:
    net = nn.GRU(3, 8, dtype=F64)
    plan = with_units(net, "auto")
    layer = swap(net, plan)
    wanted = convert_module(net, plan)[0]
    torch.testing.assert_close(layer.weight_ih_l0, wanted.weight_ih_l0, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias_hh_l0, wanted.bias_hh_l0, rtol=0, atol=0)
    with pytest.raises(PlanError, match="other factors"):
        swap(wanted, make_plan([describe("", net)], "auto"))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_calibrated_fit_weighs_the_units_where_they_now_are(kind: type[nn.RNNBase]) -> None:
    """A diagonal in the new order is a diagonal in the old one: with and without relabelling the fit is the same."""

    class States(Sums):
        def model(self) -> nn.Module:
            return net

        def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = model(batch)[0]
            return out

    net = kind(3, 8, dtype=F64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    plan = with_units(net, "diag")
    plain, account = kruify.convert(net, "diag", task=States())
    moved, relabelled = kruify.convert(net, plan=plan, task=States())
    x = torch.randn(7, 2, 3, dtype=F64)
    torch.testing.assert_close(moved(x), plain(x), rtol=0, atol=1e-10)
    for a, b in zip(account.matrices, relabelled.matrices, strict=True):
        assert (a.energy, a.energy_weighted) == pytest.approx((b.energy, b.energy_weighted))


def test_distillation_and_healing_compare_in_the_order_of_the_teacher() -> None:
    torch.manual_seed(1)
    net = Net(nn.GRU(3, 8, 2, dtype=F64))
    exact, _ = convert_module(net, with_units(net, "16*(4x2,2x4)"))
    batch = torch.randn(6, 5, 3, dtype=F64)
    distillation = Distillation(exact, net, Sums(), Recipe())
    assert float(distillation.healing(batch).detach()) < 1e-20
    assert float(distillation.loss(batch).detach()) == pytest.approx(
        float(0.5 * Sums().loss(net(batch), batch).detach()), rel=1e-9
    )


@pytest.mark.parametrize("inputs", [None, "2x1,4x3+sparse:10%:1"])
def test_fine_tuning_keeps_the_order(inputs: str | None) -> None:
    net = Net()
    small, _ = convert_module(net, with_units(net, "2*(8x1,1x8)+sparse:6%:1", inputs))
    units = small.rnn.relabel_l0.units
    before = Sums().evaluate(small, "valid")["loss"]
    options = {"overlay_start": 1.0, "heal_epochs": 1.0}
    result = finetune(small, Sums(), teacher=net, epochs=2, lr=1e-2, device="cpu", **options)
    assert plan_of(result.model).layers[0].relabelled["weight_hh_l0"] == units
    assert result.metrics["loss"] < before


def test_an_overlay_that_begins_dense_begins_as_the_dense_network() -> None:
    from kruify.training.anneal import OverlayAnnealing

    net = Net()
    small, _ = convert_module(net, with_units(net, "8x1,1x8+sparse:6%:1", "2x1,4x3+sparse:10%:1"))
    OverlayAnnealing(small, net.state_dict(), 1.0, 0.5).grow()
    x = torch.randn(6, 5, 3, dtype=F64)
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-12)


def test_a_search_without_time_is_refused() -> None:
    with pytest.raises(UsageError, match="time limit"):
        kruify.convert(Net(), "auto", relabel=True, relabel_seconds=0)


def test_stacked_gates_keep_their_order() -> None:
    converted, account = kruify.convert(planted(), "stacked:12x4,2x2", relabel=True)
    assert account.relabelled == [] and not any("relabel" in name for name in converted.state_dict())
