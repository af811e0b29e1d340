"""`kruify tasks`."""

from __future__ import annotations

from pathlib import Path

import click

from .console import json_option, output


@click.command()
@click.option("--export", "name", metavar="NAME", help="Write this task's published network as a plain state dict.")
@click.option("-o", "--output", "target", metavar="FILE", help="File for --export: .pt, .pth or .safetensors.")
@json_option
def tasks(name: str | None, target: str | None, json_only: bool) -> None:
    """List the built-in tasks, or write a task's published network."""
    if (name is None) != (target is None):
        raise click.UsageError("--export NAME and -o FILE belong together")
    with output(json_only) as out:
        if name is not None and target is not None:
            parameters = _export(name, Path(target))
            out.show(f"wrote {target}: the published network of {name}, {parameters:,} parameters")
            out.result({"task": name, "output": target, "parameters": parameters})
            return
        from rich.table import Table

        from kruify.tasks.loader import BUILTIN, task_class

        table = Table()
        for heading in ("task", "metric", "measures", "a network that learnt nothing"):
            table.add_column(heading)
        rows = []
        for builtin in BUILTIN:
            cls = task_class(builtin)
            table.add_row(builtin, cls.metric, cls.measures, cls.chance)
            rows.append(
                {
                    "name": builtin,
                    "metric": cls.metric,
                    "higher_is_better": cls.higher_is_better,
                    "measures": cls.measures,
                    "chance": cls.chance,
                }
            )
        out.show(table, "Yours: a file with a class of kruify.task.Task in it, named as path/to/file.py:Name")
        out.result({"tasks": rows})


def _export(name: str, path: Path) -> int:
    """Writes the network; returns its number of parameters."""
    from kruify.checkpoint import check_model_target, write_model
    from kruify.tasks.loader import load_task

    check_model_target(path)
    tensors = load_task(name).published()
    write_model(path, tensors)
    return sum(tensor.numel() for tensor in tensors.values())
