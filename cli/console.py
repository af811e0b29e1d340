"""Where output goes: results on stdout, one JSON object alone with --json, all else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kruify.progress import Progress

    from .plain import PlainConsole

SCHEMA = 1  # of every JSON object that a command prints: raised when a key changes its name or its meaning
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
        if not self.json_only:
            _print(self._stdout, renderables)

    def note(self, *renderables: RenderableType) -> None:
        """The same on stderr, with `json_only`, too."""
        _print(sys.stderr, renderables)

    def result(self, value: dict[str, Any]) -> None:
        """Prints the JSON object, where it was asked for."""
        if self.json_only:
            value = {"schema": SCHEMA, **finite(value)}
            print(json.dumps(value, indent=2, allow_nan=False), file=self._stdout)


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
    """A bar where stderr is a terminal, else one line there for each phase that takes its time."""
    from .bar import Bar, Lines

    console = _console(sys.stderr)
    with (Bar if console.is_terminal else Lines)(console, description) as shown:
        yield shown.advance


def _print(file: TextIO, renderables: Iterable[RenderableType]) -> None:
    from rich.text import Text

    console = _console(file)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str | Text))


def _console(file: Any) -> PlainConsole:
    from .plain import PlainConsole

    console = PlainConsole(file)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return PlainConsole(file, width=WIDTH)
