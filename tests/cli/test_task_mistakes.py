"""Mistakes in a user's task: one sentence that says which method, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kruify.errors import TaskError, UsageError
from kruify.tasks.base import measure
from kruify.tasks.loader import load_task
from kruify.training import Recipe

MISTAKES = """
from task import *


class Number(Echo):
    def evaluate(self, model, split):
        return 0.3


class Words(Echo):
    def evaluate(self, model, split):
        return {"loss": "good"}


class Other(Echo):
    def evaluate(self, model, split):
        return {"accuracy": 1.0}


class Tensors(Echo):
    def evaluate(self, model, split):
        return {"loss": torch.tensor(0.25)}


class NotANumber(Echo):
    def evaluate(self, model, split):
        return {"loss": float("nan")}


class NoModel(Echo):
    def model(self):
        return None


class Vector(Echo):
    def loss(self, outputs, batch):
        return outputs.mean(-1)


class Plain(Echo):
    def loss(self, outputs, batch):
        return float(super().loss(outputs, batch))


class Detached(Echo):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch).detach()


class NanLoss(Echo):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * float("nan")

    def evaluate(self, model, split):
        return {"loss": 1.0}


class ComplexLoss(Echo):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * 1j


class NoBatches(Echo):
    def batches(self, split, *, seed=0):
        return None


class Huge(Echo):
    def evaluate(self, model, split):
        return {"loss": 10**400}


class Exits(Echo):
    def batches(self, split, *, seed=0):
        raise GeneratorExit


class ExitsLater(Echo):
    def batches(self, split, *, seed=0):
        yield from super().batches(split, seed=seed)
        raise GeneratorExit


class NoWeight(Echo):
    def weight(self, batch):
        return 0


class WordWeight(Echo):
    def weight(self, batch):
        return "heavy"


class Seedless(Echo):
    def batches(self, split):
        yield torch.zeros(5, 4, 3)


class NoLoss(Echo):
    loss = None


class NoForward(Echo):
    def __init__(self):
        self.forward = 3


class NothingToRead(Echo):
    batches = None


class Leaves(Echo):
    def model(self):
        raise SystemExit(3)
"""


@pytest.fixture
def mistakes(folder: Path) -> Path:
    Path("mistakes.py").write_text(MISTAKES)
    return folder


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Number", 'Number: evaluate() gave a float, not a dict such as {"loss": 0.5}'),
        ("Words", "Words: evaluate() gave a str as 'loss', not a number"),
        ("Other", "Other: evaluate() gave accuracy, but not the metric 'loss'"),
        ("NoModel", "NoModel: model() gave None, not a torch.nn.Module"),
        ("Seedless", "Seedless: batches() takes no seed. Write batches(self, split, *, seed=0)"),
        ("NoLoss", "NoLoss: its loss is None, not a method. Write def loss(self, ...)"),
        ("NoForward", "NoForward: its forward is a int, not a method. Write def forward(self, ...)"),
        ("NothingToRead", "NothingToRead: its batches is None, not a method. Write def batches(self, ...)"),
        ("Leaves", "the task failed: SystemExit: 3"),
        ("ComplexLoss", "ComplexLoss: loss() gave a complex number"),
        ("NoBatches", "NoBatches: batches() gave None, nothing to iterate over"),
        ("Huge", "Huge: evaluate() gave a int as 'loss', not a number"),
        ("Exits", "the task failed: GeneratorExit"),
        ("ExitsLater", "the task failed: GeneratorExit"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_methods(command, name, sentence, mistakes, run):
    more = ("-o", "out.pt", "--epochs", "0.4") if command == "finetune" else ()
    result = run(command, "model.pt", "--task", f"mistakes.py:{name}", *more)
    assert result.exit_code == 2, result.stderr
    assert sentence in result.stderr
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Vector", "Vector: loss() gave a Tensor of shape (5, 4), not one number in a tensor"),
        ("Plain", "Plain: loss() gave a float, not one number in a tensor"),
        ("Detached", "Detached: loss() gave a number without a gradient"),
        ("NoWeight", "NoWeight: weight() gave 0, not a number above 0"),
        ("WordWeight", "WordWeight: weight() gave heavy, not a number above 0"),
        ("NanLoss", "training diverged: no step of the epoch has a finite gradient"),
        ("NotANumber", "NotANumber: evaluate() gave NaN as 'loss' on the valid split"),
    ],
)
def test_training(name, sentence, mistakes, run):
    result = run("finetune", "model.pt", "--task", f"mistakes.py:{name}", "-o", "out.pt", "--epochs", "1")
    assert result.exit_code == 2, result.stderr
    assert sentence in result.stderr
    assert not Path("out.pt").exists()


def test_numbers_in_tensors_are_numbers(mistakes, run_json):
    assert run_json("evaluate", "model.pt", "--task", "mistakes.py:Tensors")["metrics"] == {"loss": 0.25}
    assert run_json("evaluate", "model.pt", "--task", "mistakes.py:NotANumber")["metrics"] == {"loss": None}


def test_what_all_else_is_compared_with_is_known(mistakes, run):
    task = load_task("mistakes.py:NotANumber")
    with pytest.raises(TaskError, match="on the test split"):
        measure(task, task.model(), "test", known=True)
    options = ("--task", "mistakes.py:NotANumber", "--epochs", "0.4")
    for command in (("compress", "--budget", "2x", "-o", "x"), ("sweep", "--budgets", "2x", "--dir", "x")):
        result = run(command[0], "model.pt", *command[1:], *options)
        assert result.exit_code == 2
        assert "gave NaN" in result.stderr


def test_options_that_are_no_numbers():
    for name in ("epochs", "lr", "clip"):
        with pytest.raises(UsageError, match=f"{name} must be a number, got nan"):
            Recipe().changed(**{name: float("nan")})
    with pytest.raises(UsageError, match="epochs must be a number, got inf"):
        Recipe().changed(epochs=float("inf"))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:x", "meta"])
def test_devices(device, folder, run):
    result = run("finetune", "model.pt", "--task", "task.py:Echo", "-o", "out.pt", "--device", device)
    assert result.exit_code == 2
    assert f"there is no device {device} here" in result.stderr


def test_a_sweep_that_cannot_make_its_folder(folder, run):
    result = run("sweep", "model.pt", "--task", "task.py:Echo", "--budgets", "2x", "--dir", "task.py")
    assert result.exit_code == 2
    assert "task.py: the folder cannot be made (File exists)" in result.stderr
    for option in ("--log-dir", "--resume"):
        command = ("compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "-o", "x.pt")
        result = run(*command, option, "/proc/self")
        assert result.exit_code == 2 and "/proc/self: the folder cannot be written to" in result.stderr


def test_too_little_memory_is_no_bug(folder, run, monkeypatch):
    monkeypatch.setattr("kruify.conversion.tensors.fit_with", lambda *_, **__: torch.empty(2**60))
    result = run("convert", "model.pt", "--factors", "4x4,2x2")
    assert result.exit_code == 2
    assert "there is not enough memory" in result.stderr


def test_a_full_disk_is_no_bug(folder, run, monkeypatch):
    def full(tree, file, **options):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 61952 vs 61840")  # noqa: B904 - as torch.save does

    monkeypatch.setattr(torch, "save", full)
    result = run(
        "finetune", "model.pt", "--task", "task.py:Echo", "--epochs", "0.4", "-o", "x.safetensors", "--resume", "state"
    )
    assert result.exit_code == 2
    assert "state.pt: it cannot be written (No space left on device)" in result.stderr
