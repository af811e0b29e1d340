"""`kruify report DENSE KRU...`."""

from __future__ import annotations

from typing import Any

import click

from .console import json_option, output, progress
from .options import FILE, key_option, split_option


@click.command()
@click.argument("dense", metavar="DENSE", type=FILE)
@click.argument("kru", metavar="KRU...", nargs=-1, required=True, type=FILE)
@click.option("--task", metavar="TASK", help="Built-in name or path/to/file.py:Name, for its metrics.")
@split_option
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Threads of the latency figures."
)
@click.option("--details", is_flag=True, help="Print how the files were made, and each gate's condition number, too.")
@click.option("--html", "html_file", metavar="FILE", help="Write one self-contained HTML page with pictures.")
@click.option("--markdown", "markdown_file", metavar="FILE", help="Write the same as Markdown, for a model card.")
@key_option
@json_option
def report(
    dense: str,
    kru: tuple[str, ...],
    details: bool,
    html_file: str | None,
    markdown_file: str | None,
    json_only: bool,
    **options: Any,
) -> None:
    """Compare checkpoints with DENSE: size, speed, accuracy.

    Parameters, bytes, multiply-adds, latency, and with --task its metrics.
    """
    with output(json_only) as out:
        from kruify.checkpoint import atomic_file, check_target
        from kruify.reporting import tables, to_html, to_markdown
        from kruify.reporting.build import report as run

        taken = [dense, *kru]
        for target in filter(None, (html_file, markdown_file)):
            check_target(target, *taken)
            taken.append(target)
        with progress("reading") as advance:
            made = run(dense, *kru, progress=advance, **options)
        out.show(*tables(made, details))
        for file, write in ((html_file, to_html), (markdown_file, to_markdown)):
            if file:
                with atomic_file(file) as handle:
                    handle.write(write(made).encode())
                out.show(f"wrote {file}")
        out.result(made.to_json())
