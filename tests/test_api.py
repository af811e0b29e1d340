"""`kruify.NAME`: one Python call for what one command does, on files and on modules."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from torch import nn

import kruify


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Echo(kruify.Task):
    """Say the first two features again."""

    metric = "loss"

    def model(self):
        return Net()

    def batches(self, split, *, seed=0):
        generator = torch.Generator().manual_seed(seed if split == "train" else 1000)
        for _ in range(3):
            yield torch.randn(5, 4, 3, generator=generator)

    def forward(self, model, batch):
        return model(batch)

    def loss(self, outputs, batch):
        return (outputs - batch[..., :2]).square().mean()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Net().state_dict(), "model.pt")
    return tmp_path


def loss(model):
    """Of the test split, computed by hand."""
    with torch.no_grad():
        return sum(float(Echo().loss(model(x), x)) for x in Echo().batches("test")) / 3


def test_every_exported_name_is_there():
    for name in kruify.__all__:
        assert getattr(kruify, name) is not None
    assert set(kruify.__all__) <= set(dir(kruify))
    assert kruify.__version__ == importlib.metadata.version("kruify")


def test_a_file_and_a_module_are_converted_alike(folder):
    model = Net()
    model.load_state_dict(torch.load("model.pt"))
    small, of_module = kruify.convert(model, budget="3x", seed=3)
    of_file = kruify.convert("model.pt", budget="3x", output="small.pt", seed=3)
    assert str(of_file.output) == "small.pt" and of_module.output is None
    assert of_file.matrices == of_module.matrices and of_file.parameters == of_module.parameters
    assert of_file.parameters.recurrent_ratio >= 3
    again = kruify.load("small.pt", into=Net())
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert kruify.convert("model.pt").output.name == "model.kru.safetensors"
    with pytest.raises(kruify.KruifyError, match="converted already"):
        kruify.convert("small.pt")


def test_a_module_is_converted_by_error_plan_file_and_task_and_written(folder):
    model = Net()
    _, found = kruify.convert(model, max_error=0.4, dry_run=True)
    assert found.tensors == {} and all(gate.relative_error < 0.4 for gate in found.matrices)  # it has searched
    _, counted = kruify.convert(model, plan=found.plan, dry_run=True)
    assert counted.matrices[0].to_json()["energy"] is None
    (folder / "plan.json").write_text(found.plan.to_json())
    small, made = kruify.convert(model, plan="plan.json", task=Echo(), output="small.kru.safetensors")
    assert all(gate.relative_error < 0.4 for gate in kruify.convert(model, plan="plan.json")[1].matrices)
    assert all(gate.energy_weighted is not None for gate in made.matrices)
    assert json.loads(json.dumps(made.to_json()))["parameters"]["recurrent_before"] == 3 * 16 * 16
    loaded = kruify.load("small.kru.safetensors", into=Net())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_inspection_of_a_file_and_a_module(folder):
    small, _ = kruify.convert(Net(), "4x4,4x4")
    kruify.save(small, "small.pt")
    for source in (small, "small.pt"):
        (layer,) = kruify.inspect(source).summaries
        assert layer.recurrent_parameters == 3 * 32
        assert layer.factors == {"weight_hh_l0": dict.fromkeys("rzn", "4x4,4x4")}
    assert kruify.inspect("small.pt").file.bytes == (folder / "small.pt").stat().st_size


def test_finetuning_and_evaluation(folder):
    kruify.convert("model.pt", "4x4,4x4")
    before = kruify.evaluate("model.kru.safetensors", Echo())
    assert before.split == "test" and before.metrics["loss"] == pytest.approx(
        loss(kruify.load("model.kru.safetensors", into=Net())), rel=1e-5
    )
    told = {"teacher": "model.pt", "epochs": 2, "lr": 0.01, "device": "cpu"}
    kruify.finetune("model.kru.safetensors", Echo(), output="tuned.kru.safetensors", **told)
    after = kruify.evaluate("tuned.kru.safetensors", Echo())
    assert after.metrics["loss"] == pytest.approx(loss(kruify.load("tuned.kru.safetensors", into=Net())), rel=1e-5)
    assert after.metrics["loss"] < before.metrics["loss"]
    with pytest.raises(kruify.KruifyError, match="reads or writes it"):
        kruify.finetune("model.kru.safetensors", Echo(), output="model.kru.safetensors")


def test_training_from_scratch(folder):
    pytest.importorskip("matplotlib")
    done = kruify.train(Echo(), steps=4, output="own.pt", conditioning="own.svg", device="cpu", seed=1)
    assert done.steps == 4 and (folder / "own.svg").read_text().startswith("<?xml")
    assert kruify.evaluate("own.pt", Echo(), "valid").metrics["loss"] == pytest.approx(done.metrics["loss"], rel=1e-5)
    with pytest.raises(kruify.KruifyError, match="reads or writes it"):
        kruify.train(Echo(), steps=1, output="same.pt", conditioning="same.pt")


def test_compression_sweep_and_report(folder):
    told = {"share": 0, "epochs": 0.5, "device": "cpu"}
    done = kruify.compress("model.pt", Echo(), "2x", output="small.kru.safetensors", **told)
    assert kruify.evaluate("small.kru.safetensors", Echo()).metrics["loss"] == pytest.approx(loss(done.model), rel=1e-5)
    curve = kruify.sweep("model.pt", Echo(), ["2x"], **told)
    assert curve.points[1].recurrent_parameters <= 3 * 16 * 16 / 2 and (folder / "model.pt.sweep").is_dir()
    report = kruify.report("model.pt", "small.kru.safetensors", task=Echo(), latency_seconds=0.01)
    assert report.models[1].metrics["loss"] == pytest.approx(loss(done.model), rel=1e-5)
    assert kruify.verify("small.kru.safetensors", "model.pt")
    with pytest.raises(kruify.KruifyError, match="folder"):
        kruify.sweep(Net(), Echo(), ["2x"])


def test_export(folder):
    small, _ = kruify.convert(Net(), "4x4,4x4", output="small.pt")
    (made,) = kruify.export("small.pt", "dense", "dense.pt")
    assert made.to_json()["output"] == "dense.pt"
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(kruify.load("dense.pt", into=Net())(x), small(x), rtol=0, atol=1e-5)
    with pytest.raises(kruify.KruifyError, match="with its task"):
        kruify.export(small, "torch", "small.pt2")
