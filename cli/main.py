"""The `kruify` command: its subcommands, and what becomes of errors."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from kruify.errors import KruifyError, TaskError, UsageError, printable

from .compress import compress
from .convert import convert
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .inspect import inspect
from .report import report
from .sweep import sweep
from .tasks import tasks
from .train import train
from .verify import verify

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class Commands(click.Group):
    """A group whose commands end in the documented exit codes, never in a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        with _noted_interrupts() as interrupts:
            try:
                # torch says once for all layers that oneDNN has no projections; that is nothing to act on.
                warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
                raise
            except BaseException as error:  # task files may raise SystemExit or GeneratorExit, too
                # Interrupted imports may end in errors of their own.
                if interrupts or isinstance(error, KeyboardInterrupt | click.Abort):
                    click.echo("kruify: interrupted; nothing was left half-written", err=True)
                    raise click.exceptions.Exit(INTERRUPTED) from None
                if os.environ.get("KRUIFY_DEBUG", "0") not in ("", "0"):
                    traceback.print_exc()
                sentence, exit_code = explain(error)
                click.echo(f"kruify: {sentence}", err=True)
                raise click.exceptions.Exit(exit_code) from error


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Every Ctrl-C is noted in the list, beside what it does anyway: nothing in a shell's background jobs."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not heard or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def explain(error: BaseException) -> tuple[str, int]:
    """One sentence about an exception, and the exit code."""
    if isinstance(error, KruifyError):
        return str(error), error.exit_code
    name = type(error).__name__
    text = printable(" ".join(f"{name}: {error}".split()))
    if line := _line_of_task_file(error):
        return f"{line}: the task failed: {text[:300]}. KRUIFY_DEBUG=1 shows the traceback", TaskError.exit_code
    if isinstance(error, MemoryError) or "can't allocate memory" in text or name == "OutOfMemoryError":
        return "there is not enough memory for this; give a smaller rank, batch or network", UsageError.exit_code
    if isinstance(error, OSError) and error.errno is not None:  # a full disk, a closed terminal: no bug
        return f"{error.filename or 'standard output'}: {os.strerror(error.errno)}", UsageError.exit_code
    bug = f"this is a bug in kruify: {text[:300]}. Run again with KRUIFY_DEBUG=1 and report the traceback"
    return bug, KruifyError.exit_code


def _line_of_task_file(error: BaseException) -> str | None:
    """`file:line` where the error passed through a task file of the user's, if it did."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith("kruify_task_"):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kruify", prog_name="kruify")
def cli() -> None:
    """Make a trained RNN, LSTM or GRU checkpoint small and fast with Kronecker Recurrent Units.

    \b
      kruify inspect  model.pt                                what is inside
      kruify convert  model.pt --factors 4*(16x16,16x16)      small, but no longer accurate
      kruify finetune model.kru.safetensors --task my.py:Name -o small.kru.safetensors
      kruify report   model.pt small.kru.safetensors --task my.py:Name

    MODEL is a checkpoint file (.pt, .pth, .safetensors). TASK is a built-in name (see `kruify tasks`) or
    path/to/file.py:Name. With --json a command prints one JSON object on stdout and nothing else there.

    Exit codes: 0 done, 1 a bug, 2 usage, 3 refused as unsafe, 4 corrupt file, 5 unsupported, 6 target not met.
    """


for _command in (inspect, convert, finetune, compress, evaluate, sweep, report, export, train, verify, tasks):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale may lack what a name or a table is drawn with
    try:
        cli(prog_name="kruify")
    except BrokenPipeError:  # `kruify inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
