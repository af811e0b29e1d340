"""Hostile options, tasks and terminals: the documented exit code, one sentence, and nothing beside the JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE, LONG = "9" * 30, "9" * 5000


def kruify(*arguments, **environment):
    command = [sys.executable, "-m", "kruify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "options",
    [
        ("--factors", f"{HUGE}*(2x4,4x2)"),
        ("--factors", "999999999*(2x4,4x2)"),
        ("--factors", f"{LONG}x2"),
        ("--factors", f"auto:{HUGE}"),
        ("--factors", "auto:5000"),
        ("--factors", f"2x2+sparse:{LONG}%"),
        ("--factors", f"2x2+sparse:2%:{HUGE}"),
        ("--factors", "\u0662x\u0662"),  # digits, though not those of the grammar
        ("--budget", f"{LONG}x"),
        ("--budget", "\u0662x"),
        ("--max-error", "1e400"),
        ("--factors", "2x2", "-o", ""),
        ("--factors", "2x2", "--plan-out", ""),
        ("--plan", "/dev/zero"),
        ("--plan", "pipe"),
    ],
)
def test_options_beyond_reason_are_usage_errors(options, folder, run):
    os.mkfifo("pipe")
    before = sorted(folder.iterdir())
    result = run("convert", "model.pt", *options)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert len(result.stderr.strip().splitlines()[-1]) > 0
    assert sorted(folder.iterdir()) == before


def test_json_stands_alone_when_a_task_prints_by_other_ways(folder):
    Path("loud.py").write_text(
        Path("task.py").read_text()
        + "\n\nclass Loud(Echo):\n    def model(self):\n        import os, subprocess, sys\n"
        "        os.write(1, b'descriptor')\n        subprocess.run([sys.executable, '-c', 'print(\"child\")'])\n"
        "        return Net()\n"
    )
    done = kruify("evaluate", "model.pt", "--task", "loud.py:Loud", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["split"] == "test"
    assert "descriptor" in done.stderr and "child" in done.stderr


def test_a_terminal_without_unicode_is_served(folder):
    os.rename("model.pt", "mod\u00e8le.pt")
    done = kruify("inspect", "mod\u00e8le.pt", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "GRU" in done.stdout.upper()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    def loss(self, outputs, batch):\n        return outputs.sum().to(torch.complex64)\n", "complex number"),
        ("    def evaluate(self, model, split):\n        return {'loss': 10**400}\n", "not a number"),
        ("    def evaluate(self, model, split):\n        raise GeneratorExit\n", "GeneratorExit"),
    ],
)
def test_strange_tasks_are_named(body, words, folder, run):
    Path("strange.py").write_text(Path("task.py").read_text() + "\n\nclass Strange(Echo):\n" + body)
    result = run("evaluate", "model.pt", "--task", "strange.py:Strange")
    assert result.exit_code == 2, result.stderr
    assert words in result.stderr
