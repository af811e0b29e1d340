"""`kruify sweep MODEL --task TASK --budgets 2x,4x,8x,16x`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output, progress
from .options import (
    NUMBER,
    device_option,
    dtype_option,
    keep_option,
    key_option,
    lr_option,
    model_argument,
    ray_options,
    seed_option,
    selection_options,
    split_option,
    task_option,
)
from .training import log_dir_option, others_option, recipe_options, share_option

if TYPE_CHECKING:
    from kruify.search.trade_off import Point, Sweep
    from kruify.tasks.base import Task


@click.command()
@model_argument
@task_option
@click.option(
    "--budgets", metavar="B,B,...", default="2x,4x,8x,16x", show_default=True, help="As for convert --budget."
)
@click.option(
    "--dir",
    "folder",
    metavar="DIR",
    help="Where networks and state go; an address such as s3://bucket/curve, too.  [default: MODEL.sweep beside it]",
)
@click.option("--epochs", type=NUMBER, help="Passes over the train split for each network.  [default: 5]")
@share_option
@selection_options
@lr_option
@others_option
@log_dir_option
@ray_options
@click.option("--html", "html_file", metavar="FILE", help="Write a report on all networks, the knee marked.")
@device_option
@dtype_option
@keep_option
@split_option
@seed_option
@key_option
@json_option
def sweep(
    model: str, task: str, budgets: str, html_file: str | None, others: tuple[str, ...], json_only: bool, **options: Any
) -> None:
    """Draw the trade-off curve of MODEL under several budgets.

    For each budget MODEL is converted, with the structure and at the learning rate that validate best after a short
    training, and fine-tuned. The knee is where more compression begins to cost.
    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    with output(json_only) as out:
        from kruify.api import sweep as run
        from kruify.checkpoint import atomic_file, check_target
        from kruify.checkpoint.remote import is_remote
        from kruify.errors import UsageError
        from kruify.reporting import to_html
        from kruify.reporting.build import report
        from kruify.tasks.loader import load_task

        if html_file:
            check_target(html_file, model)
            if is_remote(options["folder"]):
                what = "the report of a sweep reads its networks on this machine"
                raise UsageError(what, options["folder"], "Leave --html out, or give a folder here")
        found = load_task(task)
        with progress(f"reading {model}") as advance:
            done = run(
                model,
                found,
                # A comma inside a budget (params=8x,macs=50%) is followed by a name.
                [b.strip() for b in re.split(r",(?!\s*macs=)", budgets) if b.strip()],
                progress=advance,
                on_point=lambda point: out.note(_line(point, found)),
                **recipe_options(others, options),
            )
        _show(out, done)
        if html_file:
            files = [point.file for point in done.points if point.file]
            with progress("report") as advance:
                made = report(model, *files, task=task, split=options["split"], key=options["key"], progress=advance)
            knee = None if done.knee is None else made.models[done.knee].name
            with atomic_file(html_file) as handle:
                handle.write(to_html(made, knee=knee, heading=f"{Path(model).name}: the trade-off").encode())
            out.show(f"wrote {html_file}")
        out.result(done.to_json())


def _line(point: Point, task: Task) -> str:
    sizes = f"{point.recurrent_parameters:,} recurrent parameters, {point.bytes:,} bytes"
    return f"{point.budget}: {task.metric} {point.metrics[task.metric]:.4f}, {sizes}"


def _show(out: Output, done: Sweep) -> None:
    from rich.text import Text

    from kruify.reporting.terminal import table as titled

    sizes = ["recurrent parameters", "smaller", "all parameters", "bytes"]
    if done.of_file:
        sizes = ["bytes", "smaller", "recurrent parameters", "all parameters"]
    table = titled(f"{done.metric}, {done.split} split", "budget", *sizes, done.metric, words=0)
    table.add_column("")
    dense, *others = done.points
    points = [dense, *([] if done.int8 is None else [done.int8]), *others]
    marked = None if done.knee is None else done.points[done.knee]
    values = [point.metrics[done.metric] for point in points]
    known = [value for value in values if math.isfinite(value)]
    low = min([0.0, *known])  # a bar begins at 0, so that a small loss looks small
    span = (max(known, default=0.0) - low) or 1.0
    for point, value in zip(points, values, strict=True):
        bar = "\u2588" * (1 + round(23 * (value - low) / span)) if math.isfinite(value) else ""
        told = {
            "recurrent parameters": f"{point.recurrent_parameters:,}",
            "all parameters": f"{point.total_parameters:,}",
            "bytes": f"{point.bytes:,}",
            "smaller": f"{done.smaller(point):.1f}x",
        }
        table.add_row(
            point.budget,
            *(told[size] for size in sizes),
            f"{value:.4f}",
            Text.assemble(bar, " ", ("knee", "bold")) if point is marked else bar,
        )
    out.show(table)
