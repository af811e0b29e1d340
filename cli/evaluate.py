"""`kruify evaluate MODEL --task TASK`."""

from __future__ import annotations

import click

from .console import json_option, output, progress
from .options import key_option, model_argument, split_option, task_option


@click.command()
@model_argument
@task_option
@split_option
@key_option
@json_option
def evaluate(model: str, task: str, split: str, key: str | None, json_only: bool) -> None:
    """Measure what MODEL, dense or converted, achieves on a task."""
    with output(json_only) as out:
        from rich.text import Text

        from kruify.api import evaluate as run

        with progress(f"reading {model}") as advance:
            found = run(model, task, split, key=key, progress=advance)
        counted = "" if found.examples is None else f" ({found.examples:,} examples)"
        values = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        out.show(Text.assemble(f"{model} on {split}{counted}: ", (values, "bold")))
        out.result(found.to_json())
