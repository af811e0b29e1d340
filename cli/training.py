"""What the commands that train have in common: options of the recipe, progress, the table of what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .console import Output
from .options import NUMBER, device_option, given, group

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
    help="Share of the epochs for which each candidate is trained first; 0 for none.  [default: 0.083]",
)
log_dir_option = click.option("--log-dir", metavar="DIR", help="Write history.csv there, one line per validation.")
# Of a run, which every command that trains takes.
training_options = group(
    others_option,
    click.option(
        "--conditioning",
        metavar="FILE.svg",
        help="Measure condition number, spectral norm, unitarity defect and the gradient through time; "
        "draw them there.",
    ),
    log_dir_option,
    click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to the --log-dir, too."),
    resume_option,
    device_option,
)


def recipe_options(pairs: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The `options` that were given, and NAME=VALUE with the value in the type of the recipe's default.

    Raises:
        UsageError: a pair cannot be read, names no option of the recipe, or sets what is set already.
    """
    from kruify.errors import UsageError
    from kruify.training import Recipe

    defaults = Recipe().to_json()
    values, named = given(**options), dict[str, Any]()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name in named or (name in values and name in defaults):
            hint = f"Use --{name.replace('_', '-')} alone" if name in options else "Give it once"
            raise UsageError(f"--option {pair} sets {name} a second time", hint=hint)
        default = defaults.get(name, "")
        try:
            if not equals:
                raise ValueError
            if isinstance(default, int | float) or default is None:
                named[name] = type(default)(text) if default is not None else float(text)
            else:
                named[name] = text
        except ValueError:
            example = f"{name}={default or 1}" if name in defaults else "patience=3"
            raise UsageError(f"--option {pair} cannot be read", hint=f"Write for example --option {example}") from None
    Recipe().changed(**named)
    return values | named


def show(out: Output, outcome: FinetuneResult, task: Task, told: dict[str, Any]) -> None:
    """The validations as a table, and what was written."""
    from kruify.reporting.terminal import table

    names = list(outcome.metrics)
    title = f"{outcome.steps} steps in {outcome.seconds:.0f} s"
    validations = table(title, "epoch", "step", "training loss", *(f"{name}, valid" for name in names), words=0)
    for entry in outcome.history:
        best = " *" if entry.epoch == outcome.best_epoch else ""
        loss = "" if entry.loss is None else f"{entry.loss:.4f}"
        metrics = (f"{entry.metrics[name]:.4f}" for name in names)
        validations.add_row(f"{entry.epoch}{best}", f"{entry.step}", loss, *metrics)
    value = outcome.metrics.get(task.metric)
    reached = "" if value is None else f"{task.metric} {value:.4f} on the validation split"
    out.show(validations, f"wrote {told['output']}: the weights of epoch {outcome.best_epoch} (*), {reached}")
    if not outcome.best_epoch and len(outcome.history) > 1:
        out.show("Nothing was gained: no epoch validates better than the weights that it began with.")
    if "conditioning" in told:
        out.show(f"wrote {told['conditioning']}")
