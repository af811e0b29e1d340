"""A small network, its checkpoint and its task file, and a way to run commands in-process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from kruify.cli.main import cli

TASK = '''
import torch
from torch import nn
from kruify.tasks.base import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 8)
        self.out = nn.Linear(8, 2)


class Echo(Task):
    """Say the first two features again; it prints, as people's files do."""

    metric = "loss"

    def model(self):
        print("building the model")
        return Net()

    def batches(self, split, *, seed=0):
        generator = torch.Generator().manual_seed(seed if split == "train" else 1000)
        for _ in range(3):
            yield torch.randn(5, 4, 3, generator=generator)

    def forward(self, model, batch):
        return model.out(model.rnn(batch)[0])

    def loss(self, outputs, batch):
        return (outputs - batch[..., :2]).square().mean()

    def examples(self, split):
        return 12


class Broken(Echo):
    def batches(self, split, *, seed=0):
        raise RuntimeError("no data today")


class NotATask:
    pass
'''


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8)
        self.out = nn.Linear(8, 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model.pt`, a GRU of 8 units, and `task.py`."""
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "model.pt")
    Path("task.py").write_text(TASK)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and tables would wrap

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="kruify")

    return invoke


@pytest.fixture
def run_json(run: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Runs with --json; the whole of stdout must be one object."""

    def invoke(*arguments: str) -> dict[str, Any]:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        value = json.loads(result.stdout)
        assert isinstance(value, dict)
        return value

    return invoke
