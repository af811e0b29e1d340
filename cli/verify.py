"""`kruify verify FILE`."""

from __future__ import annotations

import click

from .console import json_option, output, progress
from .options import FILE, key_option


@click.command()
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--source", metavar="DENSE", help="The dense checkpoint that FILE should come from.")
@key_option
@json_option
def verify(file: str, source: str | None, key: str | None, json_only: bool) -> None:
    """Check a converted FILE end to end.

    Its bytes, plan and numbers, and that its layers compute what it says.
    """
    with output(json_only) as out:
        from kruify.analysis.verify import verify as check

        with progress(f"reading {file}") as advance:
            checks = check(file, source, key=key, progress=advance)
        for item in checks:
            out.show(f"{item.name}: {item.detail}")
        out.show(f"{file} is in order")
        out.result({"file": file, "checks": [{"name": c.name, "detail": c.detail} for c in checks]})
