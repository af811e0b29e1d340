"""Damaged states of a run: one sentence, exit code 4, nothing deleted."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Delay

from kruify.errors import CorruptError, UsageError
from kruify.training import finetune


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a run that was interrupted in its second epoch, after a step."""
    folder = tmp_path_factory.mktemp("run")

    def interrupt(done: float, total: float, phase: str) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        run(folder, progress=interrupt)
    return torch.load(folder / "state.pt", weights_only=True)


def run(folder: Path, **options: Any) -> Any:
    task = Delay(count=2)
    return finetune(
        task.kronecker(), task, epochs=2, lr=1e-2, device="cpu", resume=folder, save_seconds=0, **options
    )  # fmt: skip


def holds(folder: Path, state: Any, error: type[Exception], said: str) -> None:
    file = folder / "state.pt"
    torch.save(state, file)
    before = file.read_bytes()
    with pytest.raises(error, match=said):
        run(folder)
    assert file.read_bytes() == before


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is Ellipsis:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def paths(value: Any, depth: int = 3) -> list[tuple[Any, ...]]:
    """To everything in a tree of dicts and lists."""
    if not depth or not isinstance(value, dict | list):
        return []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [path for key, item in items for path in ((key,), *((key, *rest) for rest in paths(item, depth - 1)))]


def test_the_state_itself_is_continued(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "state.pt")
    assert run(tmp_path).steps == 4


@pytest.mark.parametrize("junk", [[], {}, 3, "state", {"format": 2}, torch.zeros(3), [[]] * 5])
def test_files_that_hold_something_else(junk: Any, tmp_path: Path) -> None:
    holds(tmp_path, junk, CorruptError, "state of the run cannot be read.*start over")


@pytest.mark.parametrize("value", [..., None, "x", [1], -7, 2**70, float("nan")])
def test_no_missing_or_wrong_value_is_a_bug(state: Any, value: Any, tmp_path: Path) -> None:
    """Something that a state holds is left out or replaced; that may be harmless, or is refused."""
    for path in random.Random(str(value)).sample(paths(state), 8):
        torch.save(changed(state, path, value), tmp_path / "state.pt")
        try:
            run(tmp_path)
        except (CorruptError, UsageError) as error:
            assert "\n" not in str(error)
        (tmp_path / "state.pt").unlink()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("state",), ...),
        (("model",), {}),
        (("state", "phase"), 5),
        (("state", "step"), -1),
        (("state", "history", 0, "metrics"), {"accuracy": "good"}),
        (("state", "best", "weights"), {}),
        (("moments", 0, "exp_avg"), torch.zeros(2, 5)),
        (("moments", 0, "step"), -7),
        (("run", "shapes"), 3),
    ],
)
def test_damage_is_refused_before_training(state: Any, path: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    holds(tmp_path, changed(state, path, value), CorruptError, "state of the run cannot be read")


def test_options_of_other_versions_are_named(state: Any, tmp_path: Path) -> None:
    other = changed(state, ("run", "recipe", "ema"), 0.9)
    holds(tmp_path, other, UsageError, "option 'ema', which this version does not have")
    holds(tmp_path, changed(state, ("format",), 1), UsageError, "another version")
