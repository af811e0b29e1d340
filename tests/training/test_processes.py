"""Real processes: kill -9 and resume, torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Delay, same
from torch import Tensor, nn

from kruify.layers.storage import mark
from kruify.training import finetune
from kruify.training.processes import Processes

HERE = Path(__file__).parent
SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from tiny import Delay
from kruify.layers.storage import mark
from kruify.training import finetune
slow = lambda done, total, phase: time.sleep(float(sys.argv[2])) or print(done, flush=True)
task = Delay(count=7, dropout=0.3)
import os
model = task.kronecker(seed=int(os.environ.get("RANK", 0)))  # the weights of rank 0 are the ones that count
mark(model, {{"head.weight": "int8"}})  # rounded in the last steps
device = "cpu" if torch.accelerator.is_available() else None  # None is what users leave it at
options = dict(epochs=3, lr=2e-2, save_seconds=0, device=device, accumulate=int(sys.argv[3]))
result = finetune(model, task, resume=sys.argv[1], progress=slow, **options)
patience = None
if torch.distributed.is_initialized():
    group = torch.distributed.distributed_c10d._get_default_group()
    patience = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
if result.is_main:
    state = {{"model": result.model.state_dict(), "history": result.to_json()["history"], "patience": patience}}
    torch.save(state, sys.argv[1] + "/out.pt")
"""


def script(folder: Path) -> str:
    path = folder / "train.py"
    path.write_text(SCRIPT.format(here=str(HERE)))
    return str(path)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def here(accumulate: int) -> dict[str, Any]:
    task = Delay(count=7, dropout=0.3)
    model = task.kronecker()
    mark(model, {"head.weight": "int8"})
    result = finetune(model, task, epochs=3, lr=2e-2, device="cpu", accumulate=accumulate)
    return {"model": result.model.state_dict(), "history": result.to_json()["history"]}


def test_kill_9_and_resume(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = here(1)
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, script(tmp_path), str(tmp_path)]
    process = subprocess.Popen([*command, "0.1", "1"], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 10:  # in the middle of the second epoch
            break
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.pt").exists()
    done = subprocess.run([*command, "0", "1"], env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) > 8  # it did not start over
    resumed = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(resumed["model"], whole["model"])
    assert resumed["history"] == whole["history"]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"],
}


def launch(launcher: str, *arguments: str) -> None:
    """Two processes. Between choosing a free port and listening on it another process may take it: then once more."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *arguments]
    for last in (False, True):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        network = ("EADDRINUSE", "ddress already in use", "DistNetworkError", "DistStoreError", "Rendezvous", "onnect")
        if done.returncode == 0 or last or not any(sign in done.stderr for sign in network):
            break
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_are_one_with_the_double_batch(tmp_path: Path, launcher: str) -> None:
    # 7 batches: the last step has a batch for the first process only.
    launch(launcher, script(tmp_path), str(tmp_path), "0", "1")
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    one = here(2)
    assert len(two["history"]) == 4
    assert two["patience"] >= 3600  # a validation on the main process may take long
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-9, atol=1e-10)
    for a, b in zip(two["history"], one["history"], strict=True):
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        torch.testing.assert_close(a["metrics"]["loss"], b["metrics"]["loss"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_gradients_and_numbers_are_added_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    processes.count = 2
    used, unused, elsewhere = parameters = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in range(3)]
    mine, other = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    messages: list[Tensor] = []

    def reduce(message: Tensor, reduction: str) -> Tensor:
        """Stands for accelerate's: the first call is the second process's, the second one adds it."""
        assert reduction == "sum"
        messages.append(message)
        return torch.stack(messages).sum(0)

    monkeypatch.setattr("accelerate.utils.reduce", reduce)
    for gradients, extra in (([other, None, other], [2.0, 5.0]), ([mine, None, None], [1.0, 0.5])):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        numbers = processes.sum_gradients(parameters, extra)
    assert numbers == [3.0, 5.5]
    torch.testing.assert_close(used.grad, mine + other)
    torch.testing.assert_close(elsewhere.grad, other)
    assert unused.grad is None  # no process used it: the optimiser must leave it alone
