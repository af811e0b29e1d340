"""How far a command is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .plain import PlainConsole

WORTH_A_LINE = 1.0  # seconds that a phase takes, below which it leaves no line
HEARTBEAT = 60.0  # seconds after which a phase that goes on is told again


class Bar:
    """A bar that is gone at the end. The time left is that of the count at hand, from the pace since its first step."""

    def __init__(self, console: PlainConsole, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), _Times())
        self._bar = RichProgress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(description, total=None, first=0.0, since=0.0)
        self._done, self._total = 0.0, 0.0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()

    def advance(self, done: float, total: float, phase: str) -> None:
        if done < self._done or total != self._total:  # another count: its pace is its own
            self._bar.update(self._task, first=done, since=time.monotonic())
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, total=total or None, description=phase)


class _Times(ProgressColumn):
    """Share done, time gone, time left where it is known."""

    def render(self, task: Task) -> Text:
        gone = _clock(task.elapsed or 0.0)
        if not task.total:
            return Text(gone)
        share = f"{100 * task.completed / task.total:3.0f} %  {gone}"
        steps, seconds = task.completed - task.fields["first"], time.monotonic() - task.fields["since"]
        if steps <= 0:
            return Text(share)
        return Text(f"{share}, {_clock((task.total - task.completed) * seconds / steps)} left")


class Lines:
    """One line for each phase when it is over, with the time gone since the command began, and one a minute before.

    What stands before the first colon of a phase's text names it.
    """

    def __init__(self, console: PlainConsole, description: str) -> None:
        self._console, self._text = console, description
        self._began = self._phase_began = self._told = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end()

    def advance(self, done: float, total: float, phase: str) -> None:
        if _name(phase) != _name(self._text):
            self._end()
            self._phase_began = self._told = time.monotonic()
        self._text = phase
        if time.monotonic() - self._told > HEARTBEAT:
            share = f" ({100 * done / total:.0f} %)" if total else ""
            self._line(f"{phase}{share}")

    def _end(self) -> None:
        if time.monotonic() - self._phase_began >= WORTH_A_LINE:
            self._line(self._text)

    def _line(self, text: str) -> None:
        self._told = time.monotonic()
        self._console.print(f"{_clock(self._told - self._began)}  {text}", soft_wrap=True)


def _name(phase: str) -> str:
    return phase.partition(":")[0]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
