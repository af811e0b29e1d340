"""Progress: a bar with an honest time left on a terminal, a line for each phase elsewhere."""

from __future__ import annotations

import io

import pytest

from kruify.cli import bar
from kruify.cli.bar import Bar, Lines
from kruify.cli.plain import PlainConsole


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bar, "time", clock)
    return clock


def test_a_line_for_each_phase_that_takes_its_time(clock: Clock) -> None:
    file = io.StringIO()
    with Lines(PlainConsole(file, 80), "reading model.pt") as lines:
        clock.now += 2
        lines.advance(1, 10, "choosing factors")  # over in half a second
        clock.now += 0.5
        for step in (1, 2, 3):
            lines.advance(step, 4, f"train epoch 1/2: training loss 0.{step}00")
            clock.now += 31
        lines.advance(4, 4, "train epoch 2/2: training loss 0.050")
        clock.now += 1
    assert file.getvalue().splitlines() == [
        "0:00:02  reading model.pt",
        "0:01:04  train epoch 1/2: training loss 0.300 (75 %, 0:00:31 left)",
        "0:01:36  train epoch 1/2: training loss 0.300",
        "0:01:36  train epoch 2/2: training loss 0.050",
    ]


def test_the_time_left_is_that_of_the_count_at_hand(clock: Clock) -> None:
    with Bar(PlainConsole(io.StringIO(), 80), "reading") as shown:
        (task,) = shown._bar.tasks

        def told() -> str:
            return shown._bar.columns[-1](task).plain.partition(", ")[2]

        assert told() == "" and task.total is None  # nothing is known: no time that counts up is called left
        shown.advance(500, 1000, "train epoch 1/2")  # a resumed run
        clock.now += 10
        shown.advance(510, 1000, "train epoch 1/2")
        assert told() == "0:08:10 left"
        shown.advance(0, 4, "evaluating on test")
        assert told() == ""
        clock.now += 3
        shown.advance(1, 4, "evaluating on test")
        assert told() == "0:00:09 left"
