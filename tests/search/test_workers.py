"""Parts of a search in this process and as tasks of Ray: the same bytes, also where a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from kruify.cli.main import cli
from kruify.errors import KruifyError, TaskError
from kruify.search.compression import compress
from kruify.search.trade_off import sweep
from kruify.search.workers import spread
from kruify.tasks.base import Task


class Sums(Task):
    """A worker that is told to dies in its third epoch, once."""

    def __init__(self, killed: Path | None = None) -> None:
        self.killed, self.home, self.seeds = killed, os.getpid(), set[int]()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"rnn": nn.LSTM(3, 8), "out": nn.Linear(8, 2)})

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        self.seeds |= {seed} if split == "train" else set()
        if self.killed and os.getpid() != self.home and len(self.seeds) == 3 and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for number in range(3):
            yield torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(seed + number))

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model["out"](model["rnn"](batch)[0])
        return y

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch[..., :2].cumsum(0)).square().mean()


def test_in_this_process_one_after_the_other() -> None:
    done: list[int] = []
    for item, result in spread(lambda n: done.append(n) or n * n, [3, 1, 2], False, None):
        assert result == item**2 and done[-1] == item  # the next has not begun
    assert done == [3, 1, 2]


def test_ray_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    torch.save(nn.LSTM(8, 16).state_dict(), "model.pt")
    Path("task.py").write_text(TASK)
    for command in (["sweep", "--budgets", "2x"], ["compress", "--budget", "2x", "-o", "out.pt"]):
        for option in (["--ray"], ["--ray-address", "auto"]):
            result = CliRunner().invoke(cli, [command[0], "model.pt", "--task", "task.py:Toy", *command[1:], *option])
            assert result.exit_code == 5 and "pip install 'kruify[ray]'" in result.stderr, result.output


TASK = """
import torch
from kruify.task import Task

class Toy(Task):
    def model(self): return torch.nn.LSTM(8, 16)
    def batches(self, split, *, seed=0): yield torch.ones(2, 3, 8)
    def forward(self, model, batch): return model(batch)[0]
    def loss(self, outputs, batch): return outputs.square().mean()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 on a busy machine is never
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_sweep_whose_worker_is_killed(tmp_path: Path, cluster: None, one_thread: None) -> None:
    budgets, killed = ["2x", "4x"], tmp_path / "killed"
    here = sweep(Sums().model(), Sums(), budgets, tmp_path / "here", epochs=4, share=0)
    told: list[str] = []
    there = sweep(
        Sums().model(), Sums(killed), budgets, tmp_path / "there", epochs=4, share=0, ray=True,
        on_point=lambda point: told.append(point.budget),
    )  # fmt: skip
    assert killed.exists() and sorted(told[2:]) == budgets
    assert json.dumps(there.to_json()) == json.dumps(here.to_json()).replace("/here/", "/there/")
    for budget in budgets:
        name = f"{budget}.kru.safetensors"
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    state = (tmp_path / "here" / "sweep.json").read_text().replace("/here/", "/there/")
    assert (tmp_path / "there" / "sweep.json").read_text() == state


@pytest.mark.slow
def test_candidates_of_compress(tmp_path: Path, cluster: None, one_thread: None) -> None:
    def run(task: Task, folder: str, **options: object) -> tuple[object, dict[str, Tensor]]:
        done = compress(
            task.model(),
            task,
            "2x",
            epochs=8,
            share=0.5,
            resume=tmp_path / folder,
            **options,  # type: ignore[arg-type]
        )
        return done.candidates, done.model.state_dict()

    here, there = run(Sums(), "here"), run(Sums(tmp_path / "killed"), "there", ray=True)
    assert (tmp_path / "killed").exists() and len(here[0]) == 3 and here[0] == there[0]  # type: ignore[arg-type]
    assert all(tensor.equal(there[1][name]) for name, tensor in here[1].items())


@pytest.mark.slow
def test_errors_of_tasks_and_of_clusters(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(item: int) -> int:
        raise TaskError(f"not {item}", "here", "Do otherwise")

    with pytest.raises(TaskError, match=r"here: not 1\. Do otherwise") as found:
        list(spread(refuse, [1], True, Sums()))
    assert found.value.exit_code == 2 and found.value.hint == "Do otherwise"
    with pytest.raises(KruifyError, match="could not be finished"):
        list(spread(lambda item: os.kill(os.getpid(), signal.SIGKILL), [1], True, Sums()))
