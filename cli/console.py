"""Where output goes: results on stdout, one JSON object alone with --json, all else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from kruify.progress import Progress

WIDTH = 110  # columns where the output is no terminal: files, pipes


class Output:
    """What a command prints on.

    With `json_only`, `show` prints nothing, and stray prints (a user's task file may print) go to stderr.
    """

    def __init__(self, json_only: bool, stdout: TextIO) -> None:
        self.json_only = json_only
        self._stdout = stdout

    def show(self, *renderables: RenderableType) -> None:
        """Prints lines or tables on stdout. A line is never broken: paths and hashes are there to be copied."""
        if self.json_only:
            return
        from rich.text import Text

        console = _console(self._stdout)
        for renderable in renderables:
            console.print(renderable, soft_wrap=isinstance(renderable, str | Text))

    def note(self, text: str) -> None:
        """Prints one line on stderr."""
        _console(sys.stderr).print(text, soft_wrap=True)

    def result(self, value: dict[str, Any]) -> None:
        """Prints the JSON object, where it was asked for."""
        if self.json_only:
            print(json.dumps(finite(value), indent=2, allow_nan=False), file=self._stdout)


@contextmanager
def output(json_only: bool) -> Iterator[Output]:
    """The output of one command."""
    if not json_only:
        yield Output(json_only, sys.stdout)
        return
    with _kept_for_json() as stdout, redirect_stdout(sys.stderr):
        yield Output(json_only, stdout)


@contextmanager
def _kept_for_json() -> Iterator[TextIO]:
    """stdout, while file descriptor 1, on which child processes and C code print, leads to stderr."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file: a test
        number = -1
    if number != 1:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)


json_option = click.option("--json", "json_only", is_flag=True, help="Print one JSON object on stdout, nothing else.")


def finite(value: Any) -> Any:
    """`value` with null for every number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@contextmanager
def progress(description: str) -> Iterator[Progress]:
    """A bar with the time gone and, where it is known, left; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = _console(sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def advance(done: float, total: float, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield advance


def _console(file: Any) -> Console:
    from .plain import PlainConsole

    console = PlainConsole(file)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return PlainConsole(file, width=WIDTH)
