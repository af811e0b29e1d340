"""Files that say which of a task's networks they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import NETWORK, metadata_for, read, write_safetensors
from kruify.conversion import plan_of
from kruify.conversion.network import load_network, network_of
from kruify.conversion.plan import Plan
from kruify.errors import CorruptError, PlanError, TaskError
from kruify.layers import KRU
from kruify.tasks.base import Task
from kruify.tasks.loader import load_task


def written(model: nn.Module, path: Path, network: object) -> Path:
    plan = plan_of(model)
    extra = {NETWORK: json.dumps(network)}
    metadata = metadata_for(plan.to_json(), extra=extra) if plan.layers else extra
    write_safetensors(path, model.state_dict(), metadata)
    return path


@pytest.mark.parametrize("cell", ["kru", "kru-real", "kru-gru", "kru-rnn", "lstm"])
def test_the_task_alone_brings_the_network_back(cell: str, tmp_path: Path) -> None:
    task = load_task("adding", T=6, cell=cell, hidden=8, layers=2, factors="2x2")
    model = task.model().eval()
    path = written(model, tmp_path / "a.safetensors", network_of(task))
    other = load_task("adding", T=9)
    again = load_network(read(path), other).eval()
    x = torch.rand(3, 7, 2)
    assert torch.equal(again(x), model(x))
    assert (other.cell, other.hidden) == ("rnn", 128), "the user's task must not change"


def test_a_kru_stands_in_the_plan(tmp_path: Path) -> None:
    layer = KRU(3, 8, num_layers=2, batch_first=True, dropout=0.25, factors="4x4,2x2", bias=False)
    plan = Plan.from_json(plan_of(layer).to_json())
    (item,) = plan.layers
    assert (item.layer.kind, item.layer.num_layers, item.layer.bias) == ("kru", 2, False)
    assert {name: str(s[0]) for name, s in item.matrices.items()} == {
        "weight_hh_l0": "4x4,2x2",
        "weight_hh_l1": "4x4,2x2",
    }
    kruify.save(layer, tmp_path / "a.safetensors")
    (again,) = kruify.load(tmp_path / "a.safetensors").values()
    assert isinstance(again, KRU) and again.batch_first and again.dropout == 0.25
    layer.eval()
    again.eval()
    x = torch.randn(2, 5, 3)
    for found, wanted in zip(again(x), layer(x), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(PlanError, match="is a Kronecker Recurrent Unit in the file, a RNN here"):
        kruify.load(tmp_path / "a.safetensors", into=nn.RNN(3, 8, 2))


def test_densify_makes_one_dense_factor_of_the_same_function() -> None:
    layer = KRU(3, 8, num_layers=2, factors="2x2", dtype=torch.float64)
    dense = kruify.densify(layer)
    assert {str(m.structures[0]) for m in (dense.weight_hh_l0, dense.weight_hh_l1)} == {"8x8"}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(dense(x)[0], layer(x)[0], atol=1e-12, rtol=0)


class Plain(Task):
    def model(self) -> nn.Module:
        return nn.RNN(2, 8)

    def batches(self, split, *, seed=0):
        return []

    def forward(self, model, batch):
        return model(batch)[0]

    def loss(self, outputs, batch):
        return outputs.sum()


def test_a_task_without_such_options_is_refused(tmp_path: Path) -> None:
    path = written(nn.RNN(2, 8), tmp_path / "a.safetensors", {"cell": "rnn", "hidden": 8})
    with pytest.raises(TaskError, match='holds a network with cell=rnn, and the task has no option "cell"'):
        load_network(read(path), Plain())


@pytest.mark.parametrize(
    "note",
    [
        [],
        {"hidden": "8"},
        {"hidden": True},
        {"colour": "red"},
        {"cell": "kru", "hidden": 10**9},
        {"cell": "lstm", "hidden": 10**4},
        {"cell": "kru", "hidden": 8, "factors": "3x3"},
        {"hidden": 0},
        {"hidden": 8, "layers": 10**6},
    ],
)
def test_a_damaged_or_hostile_note(note: object, tmp_path: Path) -> None:
    task = load_task("adding", T=6, cell="kru", hidden=8)
    path = written(task.model(), tmp_path / "a.safetensors", note)
    with pytest.raises(CorruptError, match="network"):
        load_network(read(path), task)


def test_a_note_that_is_no_json(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {NETWORK: "{"})
    with pytest.raises(CorruptError, match="network"):
        load_network(read(tmp_path / "a.safetensors"), load_task("adding"))
