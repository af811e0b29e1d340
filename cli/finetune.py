"""`kruify finetune MODEL --task TASK -o OUT`."""

from __future__ import annotations

from typing import Any

import click

from .console import json_option, output, progress
from .options import (
    NUMBER,
    dtype_option,
    keep_option,
    key_option,
    lr_option,
    model_argument,
    output_option,
    seed_option,
    task_option,
)
from .training import recipe_options, show, training_options


@click.command()
@model_argument
@task_option
@output_option
@click.option("--teacher", metavar="DENSE", help="Learn from this dense checkpoint, too (distillation).")
@click.option("--distill-only", is_flag=True, help="Learn from the teacher alone, without labels.")
@click.option("--epochs", type=NUMBER, help="Passes over the train split; fractions are allowed.  [default: 5]")
@lr_option
@click.option(
    "--unitary-penalty",
    type=NUMBER,
    metavar="L",
    help="Weight of the soft unitary penalty.  [default: on for a plain RNN, off for LSTM and GRU]",
)
@dtype_option
@keep_option
@training_options
@seed_option
@key_option
@json_option
def finetune(
    model: str, task: str, distill_only: bool, others: tuple[str, ...], json_only: bool, **options: Any
) -> None:
    """Train MODEL on a task, and write the weights that validate best.

    A dense MODEL may be given too: a fair comparison trains the dense network as long.
    """
    if distill_only and not options["teacher"]:
        raise click.UsageError("--distill-only needs a teacher; name the dense network with --teacher")
    with output(json_only) as out:
        from kruify.api import finetune as run
        from kruify.tasks.loader import load_task

        told = recipe_options(others, options)
        if distill_only:
            told |= {"distill_logits": 1.0, "distill_until": None}
        found = load_task(task)
        with progress(f"reading {model}") as advance:
            outcome = run(model, found, progress=advance, **told)
        if outcome.is_main:  # under torchrun one process writes and prints
            show(out, outcome, found, told)
            out.result({"output": told["output"], **outcome.to_json()})
