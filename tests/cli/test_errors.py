"""Every failure: one sentence on stderr, the documented exit code, nothing written."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kruify.conversion


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def one_sentence(result, exit_code: int) -> str:
    assert result.exit_code == exit_code, (result.exit_code, result.stderr)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("kruify: ")
    return line


def test_wrong_files(folder, run):
    torch.save({"x": Payload()}, "unsafe.pt")
    Path("text.pt").write_text("not a checkpoint")
    Path("empty.pt").touch()
    Path("cut.pt").write_bytes(Path("model.pt").read_bytes()[:-200])
    Path("old.pkl").write_bytes(pickle.dumps([1, 2]))
    torch.save({"w": torch.zeros(3)}, "plain.pt")
    before = sorted(folder.iterdir())
    for name, code in {
        "missing.pt": 2, ".": 2, "plain.pt": 2, "unsafe.pt": 3, "text.pt": 4, "empty.pt": 4, "cut.pt": 4,
    }.items():  # fmt: skip
        line = one_sentence(run("convert", name, "--factors", "2x2"), code)
        assert name in line
    assert sorted(folder.iterdir()) == before


def test_newer_schema_is_refused(folder, run):
    from kruify.checkpoint import write_safetensors

    write_safetensors("new.safetensors", {"w": torch.zeros(2)}, {"kruify.schema": "999", "kruify.plan": "{}"})
    assert "999" in one_sentence(run("inspect", "new.safetensors"), 5)


def test_missing_key(folder, run):
    state = torch.load("model.pt")
    torch.save({"generator": state, "discriminator": state}, "two.pt")
    line = one_sentence(run("inspect", "two.pt"), 2)
    assert "--key" in line
    assert run("inspect", "two.pt", "--key", "generator").exit_code == 0
    assert "nobody" in one_sentence(run("inspect", "two.pt", "--key", "nobody"), 2)


@pytest.mark.parametrize("small", ["small.kru.safetensors", "small.pt"])
def test_one_key_for_all_files_of_a_command(small, folder, run):
    """A file that was converted with --key has one state dict, and needs none."""
    state = torch.load("model.pt")
    torch.save({"generator": state, "discriminator": state}, "two.pt")
    for command in (
        ("convert", "two.pt", "--factors", "2x2", "-o", small),
        ("verify", small, "--source", "two.pt"),
        ("finetune", small, "--task", "task.py:Echo", "--epochs", "0.4", "--teacher", "two.pt", "-o", "tuned.pt"),
        ("report", "two.pt", small, "tuned.pt"),
        ("sweep", "two.pt", "--task", "task.py:Echo", "--budgets", "2x", "--epochs", "0.4", "--html", "sweep.html"),
    ):
        result = run(*command, "--key", "generator")
        assert result.exit_code == 0, (command, result.stderr)
    assert "no state dict under --key generator" in run("report", "two.pt", "model.pt", "--key", "generator").stderr


def test_shape_mismatch_with_the_task(folder, run):
    state = torch.load("model.pt")
    torch.save({**state, "out.weight": torch.zeros(2, 9)}, "other.pt")
    result = run("evaluate", "other.pt", "--task", "task.py:Echo", "--json")
    assert "out.weight" in result.stderr
    assert result.exit_code == 4
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("task.py:Nobody", 'there is no class "Nobody"'),
        ("task.py:NotATask", "is not a Task"),
        ("task.py", "the class is missing"),
        ("missing.py:Echo", "there is no such task file"),
        ("g2p-fr", "there is no such task"),
        ("task.py:Broken", "the task failed: RuntimeError: no data today"),
    ],
)
def test_task_that_cannot_be_had(task, sentence, folder, run):
    result = run("evaluate", "model.pt", "--task", task)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_report_of_a_file_without_recurrent_layers(folder, run):
    torch.save({"w": torch.zeros(3)}, "plain.pt")
    assert "plain.pt" in one_sentence(run("report", "model.pt", "plain.pt"), 2)


def test_a_bug_is_called_a_bug(folder, run, monkeypatch):
    def explode(checkpoint: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(kruify.conversion, "inspect", explode)
    line = one_sentence(run("inspect", "model.pt"), 1)
    assert "this is a bug in kruify: ZeroDivisionError: by zero" in line
    monkeypatch.setenv("KRUIFY_DEBUG", "1")
    assert "Traceback" in run("inspect", "model.pt").stderr


def test_usage_of_click(run):
    assert run("inspect").exit_code == 2
    assert run("bananas").exit_code == 2
    assert run("evaluate", "model.pt").exit_code == 2
    for seed in ("-1", str(2**32)):
        assert "--seed" in run("convert", "model.pt", "--factors", "2x2", "--seed", seed).stderr


def test_subprocess_end_to_end(folder):
    def kruify(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "kruify", *arguments], capture_output=True, text=True, check=False)

    done = kruify("convert", "model.pt", "--factors", "2x2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "model.kru.safetensors"
    assert re.fullmatch(r"(\d:\d\d:\d\d  converting\n)?", done.stderr)  # no bar where stderr is no terminal
    wrong = kruify("convert", "model.pt", "--factors", "3x3")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_interrupt_leaves_nothing_behind(folder):
    Path("slow.py").write_text(
        Path("task.py").read_text() + "\n\nclass Slow(Echo):\n    def loss(self, outputs, batch):\n"
        "        import pathlib, time\n        pathlib.Path('started').touch()\n        time.sleep(60)\n"
    )
    # Whoever runs the tests may have the signal ignored, as `&` in a script does; children inherit that.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heard += "runpy.run_module('kruify', run_name='__main__')"
    command = [sys.executable, "-c", heard, "finetune", "model.pt", "--task", "slow.py:Slow", "-o", "o.safetensors"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {"model.pt", "task.py", "slow.py", "started"}


def test_a_background_job_stays_deaf_to_ctrl_c(run, monkeypatch):
    heard = []
    monkeypatch.setattr("click.Group.invoke", lambda self, ctx: heard.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run("tasks")
        assert heard == [signal.SIG_IGN]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run("tasks")
        assert heard[1] is not signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_does_not_import_torch():
    code = "import sys; from kruify.cli.main import cli; cli(['--help'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


def test_what_an_import_gives_and_what_it_leaves_out():
    code = "import kruify.conversion, kruify.api, kruify, sys; assert callable(kruify.convert); "
    code += "assert not hasattr(kruify, 'nonsense'); "
    code += "print(*{'torch._dynamo', 'sympy', 'scipy', 'onnx', 'matplotlib', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"  # each takes from a tenth of a second to a second


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("compress", "model.pt", "--task", "task.py:Echo", "--budget", "2x", "-o", "x.pt"), "--max-drop"),
        (("finetune", "model.pt", "--task", "task.py:Echo", "-o", "x.pt"), "--lr"),
        (("export", "model.pt", "--to", "onnx", "-o", "x.onnx"), "--tolerance"),
        (("convert", "model.pt", "--budget", "2x"), "--max-error"),
    ],
)
def test_nan_bounds_nothing_and_is_refused(command, option, folder, run):
    result = run(*command, option, "nan")
    assert result.exit_code == 2
    assert "'nan' is not a number" in result.stderr
