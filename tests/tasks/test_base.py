from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from kruify.errors import TaskError, UnsupportedError
from kruify.tasks.base import Task, check_split, device_of, evaluating, to_device
from kruify.tasks.loader import BUILTIN, load_task, task_class

GOOD = """
import torch
from torch import nn
from kruify.tasks.base import Task

class Mean(Task):
    def __init__(self, size: int = 3, rate=0.5, shout: bool = False, data: str | None = None):
        self.size, self.rate, self.shout, self.data = size, rate, shout, data
    def model(self):
        return nn.Linear(self.size, 1)
    def batches(self, split, *, seed=0):
        for n in (1, 2):
            yield torch.full((4, self.size), float(n)), torch.zeros(4, 1)
    def forward(self, model, batch):
        return model(batch[0])
    def loss(self, outputs, batch):
        return (outputs - batch[1]).pow(2).mean()

class Half(Task):
    def model(self):
        return nn.Linear(1, 1)

class NeedsRoot(Mean):
    def __init__(self, root):
        self.root = root

class NoTask:
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my tasks.py"
    path.write_text(GOOD)
    return path


def test_load_from_file_and_default_evaluate(file: Path) -> None:
    task = load_task(f"{file}:Mean")
    assert type(task).__name__ == "Mean"
    model = nn.Linear(3, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.zeros_(model.bias)
    # batches of 1s and 2s against 0: (3^2 + 6^2) / 2
    assert task.evaluate(model, "valid") == {"loss": pytest.approx(22.5)}
    assert task.examples("valid") is None
    assert task.weight(next(iter(task.batches("train")))) == 1
    with pytest.raises(TaskError, match="no published network"):
        task.published()


def test_a_task_passes_through(file: Path) -> None:
    task = load_task(f"{file}:Mean")
    assert load_task(task) is task


def test_options_take_the_types_of_the_constructor(file: Path) -> None:
    task = load_task(f"{file}:Mean:size=7,rate=2,shout=yes,data=/srv/a,b")
    assert vars(task) == {"size": 7, "rate": 2.0, "shout": True, "data": "/srv/a,b"}
    assert isinstance(vars(task)["rate"], float)
    assert vars(load_task(f"{file}:NeedsRoot:root=3"))["root"] == "3"


def test_options_given_in_python_win(file: Path) -> None:
    assert vars(load_task(f"{file}:Mean:size=7,rate=2", size=8, shout=True)) == {
        "size": 8,
        "rate": 2.0,
        "shout": True,
        "data": None,
    }


def test_task_class_constructs_nothing(file: Path) -> None:
    assert task_class(f"{file}:NeedsRoot").__name__ == "NeedsRoot"


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("", r"class is missing\. Say which one: .*py:Mean, .*py:Half"),
        (":", r"class is missing"),
        (":Meen", r'no class "Meen" in it\. Name one that is there: .*py:Mean'),
        (":Task", r'no class "Task" in it\. Name one that is there: .*py:Mean'),
        (":NoTask", r'"NoTask" is not a Task\. Write `class NoTask\(Task\)`'),
        (":torch", r'"torch" is not a Task'),
        (":Half", r'"Half" lacks batches\(\), forward\(\)'),
        (":Mean:sise=3", r'no option "sise"\. It takes size, rate, shout, data'),
        (":Half:x=1", r'"Half" lacks'),
        (":Mean:size=three", r'size="three" is not of type int'),
        (":Mean:shout=maybe", r'shout="maybe" is not of type bool'),
        (":Mean:size", r'"size" is not an option'),
        (":NeedsRoot", r'option "root" has no default\. Add it to the name: .*:NeedsRoot:root=VALUE'),
    ],
)
def test_wrong_names_are_one_clear_error(file: Path, suffix: str, expected: str) -> None:
    with pytest.raises(TaskError, match=expected) as caught:
        load_task(f"{file}{suffix}")
    assert caught.value.exit_code == 2
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gone\.py: there is no such task file"):
        load_task(f"{tmp_path}/gone.py:Name")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nonesuch_module\n", r"bad\.py:1: .*ModuleNotFoundError.*Install nonesuch_module"),
        ("x = 1\nx = 1 / 0\n", r"bad\.py:2: .*ZeroDivisionError"),
        ("class Bad(:\n", r"bad\.py:1: .*SyntaxError"),
        ("import sys\nsys.exit(3)\n", r"bad\.py:2: .*SystemExit"),
        ("def f():\n  raise OSError('a\\nb')\nf()\n", r"bad\.py:2: .*OSError: a b"),
    ],
)
def test_error_inside_the_file(tmp_path: Path, source: str, expected: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    before = set(sys.modules)
    with pytest.raises(TaskError, match=expected):
        load_task(f"{path}:Bad")
    assert not [name for name in set(sys.modules) - before if name.startswith("kruify_task_")]


def test_constructor_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(GOOD + "\nclass Bad(Mean):\n    def __init__(self):\n        raise FileNotFoundError('data.bin')\n")
    line = GOOD.count("\n") + 4
    with pytest.raises(TaskError, match=rf"bad\.py:{line}: Bad\(\) failed: FileNotFoundError: data\.bin"):
        load_task(f"{path}:Bad")


def test_kruify_errors_of_the_file_keep_their_class(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from kruify.errors import UnsupportedError\nraise UnsupportedError('no GPU here')\n")
    with pytest.raises(UnsupportedError, match="no GPU here"):
        load_task(f"{path}:Mine")


def test_a_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("SIZE = 5\n")
    path = tmp_path / "mine.py"
    path.write_text(GOOD + "\nfrom neighbour_of_mine import SIZE\nclass Mine(Mean):\n    neighbour = SIZE\n")
    assert vars(type(load_task(f"{path}:Mine")))["neighbour"] == 5


def test_unknown_builtin_names_the_nearest() -> None:
    with pytest.raises(TaskError, match=r'"g2pen": there is no such task\. Did you mean g2p-en\? Built-in are g2p-en'):
        load_task("g2pen")
    with pytest.raises(TaskError, match="no such task"):
        load_task("some/file.txt:Name")


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_says_what_it_measures(name: str) -> None:
    cls = task_class(name)
    assert issubclass(cls, Task)
    assert not getattr(cls, "__abstractmethods__", ())
    assert cls.measures.endswith(".")
    assert cls.chance
    assert cls.output_kind in ("softmax", "sigmoid", "values")


def test_evaluating_restores_the_modes_it_found() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model) as device:
        assert device == device_of(model) == torch.device("cpu")
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False, False]


def test_to_device_looks_into_containers() -> None:
    Pair = namedtuple("Pair", "x y")
    batch = Pair(torch.ones(2), {"a": [torch.ones(1), "text"], "b": (torch.ones(1), None)})
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Pair)
    assert moved.x.is_meta
    assert moved.y["a"][0].is_meta
    assert moved.y["a"][1] == "text"
    assert moved.y["b"][0].is_meta
    assert moved.y["b"][1] is None


def test_check_split() -> None:
    assert check_split("valid") == "valid"
    with pytest.raises(TaskError, match='no split "dev"'):
        check_split("dev")
