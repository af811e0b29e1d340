"""How far a command is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .plain import PlainConsole

WORTH_A_LINE = 1.0  # seconds that a phase takes, below which it leaves no line
HEARTBEAT = 60.0  # seconds after which a phase that goes on is told again


class Pace:
    """The time left of the count at hand, from its pace since its first step."""

    def __init__(self) -> None:
        self._done, self._total, self._first, self._since = 0.0, 0.0, 0.0, time.monotonic()

    def advance(self, done: float, total: float) -> None:
        if done < self._done or total != self._total:  # another count: its pace is its own
            self._first, self._since = done, time.monotonic()
        self._done, self._total = done, total

    def __str__(self) -> str:
        """ "" where nothing is known yet."""
        steps = self._done - self._first
        if steps <= 0 or not self._total:
            return ""
        return f", {clock((self._total - self._done) * (time.monotonic() - self._since) / steps)} left"


class Bar:
    """A bar that is gone at the end."""

    def __init__(self, console: PlainConsole, description: str) -> None:
        self._pace = Pace()
        columns = (TextColumn("{task.description}"), BarColumn(), _Times(self._pace))
        self._bar = RichProgress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()

    def advance(self, done: float, total: float, phase: str) -> None:
        self._pace.advance(done, total)
        self._bar.update(self._task, completed=done, total=total or None, description=phase)


class _Times(ProgressColumn):
    """Share done, time gone, time left where it is known."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        gone = clock(task.elapsed or 0.0)
        return Text(f"{100 * task.completed / task.total:3.0f} %  {gone}{self._pace}" if task.total else gone)


class Lines:
    """One line for each phase when it is over, with the time gone since the command began; one a minute before, with
    the time left.

    What stands before the first colon of a phase's text names it.
    """

    def __init__(self, console: PlainConsole, description: str) -> None:
        self._console, self._text, self._pace = console, description, Pace()
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
        self._pace.advance(done, total)
        if time.monotonic() - self._told > HEARTBEAT:
            share = f" ({100 * done / total:.0f} %{self._pace})" if total else ""
            self._line(f"{phase}{share}")

    def _end(self) -> None:
        if time.monotonic() - self._phase_began >= WORTH_A_LINE:
            self._line(self._text)

    def _line(self, text: str) -> None:
        self._told = time.monotonic()
        self._console.print(f"{clock(self._told - self._began)}  {text}", soft_wrap=True)


def _name(phase: str) -> str:
    return phase.partition(":")[0]


def clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
