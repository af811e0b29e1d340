"""Hostile options, tasks and terminals: the documented exit code, one sentence, and nothing beside the JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kruify.cli.main import cli
from kruify.training import Recipe

HUGE, LONG = "9" * 30, "9" * 5000


REQUIRED = {
    "compress": ("model.pt", "--task", "task.py:Echo", "--budget", "2x", "-o", "x.pt"),
    "convert": ("model.pt", "--factors", "2x2"),
    "export": ("model.pt", "--to", "onnx", "-o", "x.onnx"),
    "finetune": ("model.pt", "--task", "task.py:Echo", "-o", "x.pt"),
    "report": ("model.pt",),
    "sweep": ("model.pt", "--task", "task.py:Echo"),
    "train": ("--task", "adding:T=5", "-o", "x.pt"),
}
"""Command -> what it cannot do without, for every command that takes numbers."""

NUMERIC = [
    (name, option.opts[-1])
    for name, command in cli.commands.items()
    for option in command.params
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
]


@pytest.mark.parametrize(("command", "option"), NUMERIC)
@pytest.mark.parametrize("value", [HUGE, LONG, f"-{HUGE}", "1e400", "nan", "two", ""])
def test_every_number_has_bounds(command, option, value, folder, run):
    before = sorted(folder.iterdir())
    result = run(command, *REQUIRED[command], f"{option}={value}")
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert option in result.stderr
    assert sorted(folder.iterdir()) == before


RECIPE = [
    name for name, value in Recipe().to_json().items() if isinstance(value, int | float | None) and name != "seed"
]


@pytest.mark.parametrize("name", [name for name in RECIPE if name not in ("epochs", "lr", "unitary_penalty")])
@pytest.mark.parametrize("value", ["1000001", "-1", LONG, "inf"])
def test_every_number_of_the_recipe_has_bounds(name, value, folder, run):
    result = run("finetune", *REQUIRED["finetune"], "--option", f"{name}={value}")
    assert result.exit_code == 2 and name in result.stderr, (result.exit_code, result.stderr)
    assert len(result.stderr) < 1300 and not Path("x.pt").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("finetune", ("--epochs", "1e8")),
        ("finetune", ("--lr", "1e8")),
        ("finetune", ("--unitary-penalty", "1e8")),
        ("finetune", ("--device", f"cuda:{HUGE}")),
        ("sweep", ("--budgets", f"{HUGE}x")),
        ("sweep", ("--budgets", "0x")),
        ("sweep", ("--trial", "1e8")),
        ("compress", ("--trial", "-1")),
        ("compress", ("--max-drop", "-5%")),
        ("compress", ("--max-drop", "-0.1")),
        ("convert", ("--max-error", "-1")),
        ("train", ("--steps", "999999999")),
        ("train", ("--cell", "lstm", "--hidden", "16777216")),
        ("train", ("--cell", "gru", "--hidden", "20000", "--layers", "1024")),
        ("train", ("--cell", "kru", "--hidden", "1048576", "--factors", "1048576x1048576")),
        ("train", ("--cell", "kru", "--hidden", "16777216", "--factors", "999999999*(2x2)")),
        ("train", ("--task", f"adding:T={HUGE}")),
        ("train", ("--task", f"adding:T={LONG}")),
        ("train", ("--task", "adding:T=5,batch_size=0")),
        ("train", ("--task", "adding:T=5,batch_size=-3")),
        ("train", ("--task", "adding:T=5,train_examples=-3")),
        ("train", ("--task", "adding:T=5,layers=999999999,hidden=1")),
        ("train", ("--task", "adding:T=5,hidden=-4")),
        ("train", ("--task", "adding:T=5,dropout=2")),
        ("train", ("--task", "adding:T=5,dropout=nan")),
        ("train", ("--task", "adding:T=999999999,train_examples=999999999,batch_size=999999999")),
    ],
)
def test_sizes_beyond_reason_are_usage_errors(command, options, folder, run):
    result = run(command, *REQUIRED[command], *options)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert not Path("x.pt").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--factors=",
        "--factors=auto --input-factors=",
        "--budget=",
        "--budget=2x --input-budget=",
        "--budget=2x --factors=",
        "--plan=",
        "--factors=auto --only=",
    ],
)
def test_empty_options_are_usage_errors(options, folder, run):
    result = run("convert", "model.pt", "-o", "x.pt", *options.split())
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert not Path("x.pt").exists()


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "y", "a\0b"])
@pytest.mark.parametrize("command", [("inspect",), ("convert", "model.pt", "--factors", "2x2", "-o")])
def test_names_that_no_file_can_have(command, name, folder, run):
    result = run(*command, name)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert len(result.stderr) < 1300 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("text", ['{"schema": 1, "schema": 1, "layers": []}', "[" * 100_000, "\xff", '{"schema": NaN}'])
def test_plans_that_are_none(text, folder, run):
    Path("plan.json").write_bytes(text.encode("latin1"))
    result = run("convert", "model.pt", "--plan", "plan.json")
    assert result.exit_code == 2 and "plan.json" in result.stderr, (result.exit_code, result.stderr)


def test_a_plan_beyond_the_limit_is_not_read(folder, run):
    with Path("plan.json").open("wb") as file:
        file.truncate(1 << 40)
    result = run("convert", "model.pt", "--plan", "plan.json")
    assert result.exit_code == 2 and "plan.json" in result.stderr


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
