"""`kruify report DENSE KRU...`."""

from __future__ import annotations

import click

from .console import json_option, output, progress
from .options import key_option, split_option


@click.command()
@click.argument("dense", metavar="DENSE")
@click.argument("kru", metavar="KRU...", nargs=-1, required=True)
@click.option("--task", "task_name", metavar="TASK", help="Built-in name or path/to/file.py:Name, for its metrics.")
@split_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of the latency figures.")
@key_option
@json_option
def report(
    dense: str,
    kru: tuple[str, ...],
    task_name: str | None,
    split: str,
    threads: int,
    key: str | None,
    json_only: bool,
) -> None:
    """Compare checkpoints with DENSE: parameters, bytes, multiply-adds, latency, the task's metrics."""
    with output(json_only) as out:
        from kruify.report import build_report, tables
        from kruify.task import load_task

        task = load_task(task_name) if task_name else None
        with progress("reading") as advance:
            made = build_report(
                [dense, *kru], task, task_name=task_name, split=split, key=key, threads=threads, progress=advance
            )
        out.show(*tables(made))
        out.result(made.to_json())
