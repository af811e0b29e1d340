"""What the commands that train have in common: options of the recipe, progress, the table of what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .console import Output
from .options import NUMBER, device_option, given

if TYPE_CHECKING:
    from kruify.tasks.base import Task
    from kruify.training import FinetuneResult

others_option = click.option(
    "--option",
    "others",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other option of kruify.training.Recipe, such as schedule=cosine or patience=3.",
)
resume_option = click.option(
    "--resume", metavar="DIR", help="Keep the state of the run there, and go on from it if it has one."
)
share_option = click.option(
    "--trial",
    "share",
    type=NUMBER,
    metavar="SHARE",
    help="Share of the epochs for which each candidate structure is trained first; 0 for none.  [default: 0.25]",
)
_OPTIONS = (
    others_option,
    click.option(
        "--conditioning",
        metavar="FILE.svg",
        help="Measure condition number, spectral norm, unitarity defect and the gradient through time; "
        "draw them there.",
    ),
    click.option("--log-dir", metavar="DIR", help="Write history.csv there, one line a validation."),
    click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to the --log-dir, too."),
    resume_option,
    device_option,
)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a run that every command that trains takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_options(pairs: tuple[str, ...], **said: Any) -> dict[str, Any]:
    """What was said with options of their own, and NAME=VALUE with the value in the type of the recipe's default.

    Raises:
        UsageError: a pair cannot be read, or sets what is set already.
    """
    from kruify.errors import UsageError
    from kruify.training import Recipe

    defaults = Recipe().to_json()
    values = given(**said)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name in values:
            hint = f"Use --{name.replace('_', '-')} alone" if name in said else "Give it once"
            raise UsageError(f"--option {pair} sets {name} a second time", hint=hint)
        default = defaults.get(name, "")
        try:
            if not equals:
                raise ValueError
            if isinstance(default, bool):
                values[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, int | float) or default is None:
                values[name] = type(default)(text) if default is not None else float(text)
            else:
                values[name] = text
        except (ValueError, KeyError):
            example = f"{name}={default or 1}" if name in defaults else "patience=3"
            raise UsageError(f"--option {pair} cannot be read", hint=f"Write for example --option {example}") from None
    return values


def show(out: Output, target: str, outcome: FinetuneResult, task: Task) -> None:
    from rich.table import Table

    names = list(outcome.metrics)
    table = Table(title=f"{outcome.steps} steps in {outcome.seconds:.0f} s, validation split", title_justify="left")
    for heading in ("epoch", "step", "training loss", *names):
        table.add_column(heading, justify="right")
    for entry in outcome.history:
        best = " *" if entry.epoch == outcome.best_epoch else ""
        loss = "" if entry.loss is None else f"{entry.loss:.4f}"
        metrics = (f"{entry.metrics[name]:.4f}" for name in names)
        table.add_row(f"{entry.epoch}{best}", f"{entry.step}", loss, *metrics)
    out.show(table, f"wrote {target}: the weights of epoch {outcome.best_epoch} (*), {_metrics(outcome, task)}")


def _metrics(outcome: FinetuneResult, task: Task) -> str:
    value = outcome.metrics.get(task.metric)
    return "" if value is None else f"{task.metric} {value:.4f} on the validation split"


def draw_conditioning(out: Output, file: str, outcome: FinetuneResult) -> None:
    from kruify.checkpoint import atomic_file
    from kruify.reporting.training import conditioning_svg

    with atomic_file(file) as handle:
        handle.write(conditioning_svg(outcome.to_json()["history"]).encode())
    out.show(f"wrote {file}")
