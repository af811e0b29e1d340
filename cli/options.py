"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Any

import click

MOST = 10**9
"""The largest number that any option takes."""


class Number(click.types.FloatParamType):
    """A float that can be compared and counted with: not nan, which would bind nothing, and not beyond any use."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not abs(number) <= MOST:
            self.fail(f"{str(value)[:40]!r} is not a number from -{MOST} to {MOST}.", param, ctx)
        return number


NUMBER = Number()

model_argument = click.argument("model", metavar="MODEL")
key_option = click.option("--key", metavar="NAME", help="The entry of the file that holds the state dict, if several.")
task_option = click.option("--task", metavar="TASK", required=True, help="Built-in name or path/to/file.py:Name.")
output_option = click.option("-o", "--output", metavar="OUT", required=True, help="File to write.")
split_option = click.option(
    "--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True, help="Data to look at."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of everything random; same seed, threads and machine, same bytes.",
)
lr_option = click.option("--lr", type=NUMBER, help="Peak learning rate of AdamW.  [default: 0.006; from scratch 0.002]")
device_option = click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1.  [default: a GPU if there is one]")

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    help="How the file stores weights; int8 has one scale a row.  [default: as MODEL does]",
)
keep_option = click.option(
    "--keep", metavar="GLOB", multiple=True, help="Weights or modules that --dtype leaves in float32."
)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line; the others keep the defaults of what is called."""
    return {name: value for name, value in options.items() if value is not None and value != ()}
