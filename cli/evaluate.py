"""`kruify evaluate MODEL --task TASK`."""

from __future__ import annotations

import click

from .console import json_option, output
from .options import key_option, model_argument, network, split_option, task_option


@click.command()
@model_argument
@task_option
@split_option
@key_option
@json_option
def evaluate(model: str, task_name: str, split: str, key: str | None, json_only: bool) -> None:
    """Measure what MODEL, dense or converted, achieves on a task."""
    with output(json_only) as out:
        from rich.text import Text

        from kruify.checkpoint import read
        from kruify.tasks.base import measure
        from kruify.tasks.loader import load_task

        checkpoint = read(model, key=key)
        task = load_task(task_name)
        net = network(checkpoint, task)
        with out.waiting(f"evaluating on {split}"):
            metrics = measure(task, net, split)
        examples = task.examples(split)
        counted = "" if examples is None else f" ({examples:,} examples)"
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        out.show(Text.assemble(f"{model} on {split}{counted}: ", (values, "bold")))
        out.result({"metrics": metrics, "split": split, "examples": examples})
