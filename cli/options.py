"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click
from click.shell_completion import CompletionItem

Command = Callable[..., None]
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


class Drop(Number):
    """A number that is not negative, or a percentage as it was written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip()
        number = super().convert(text.removesuffix("%"), param, ctx)
        if number < 0:
            self.fail(f"{text[:40]!r} is negative: 0 allows no loss at all.", param, ctx)
        return text if text.endswith("%") else number


DROP = Drop()


class GlobSpec(click.ParamType[tuple[str, str]]):
    """GLOB=SPEC as a pair."""

    name = "GLOB=SPEC"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, equals, spec = str(value).partition("=")
        if not equals or not pattern or not spec:
            raise click.UsageError(f"--set takes GLOB=SPEC, got '{value}'", ctx)
        return pattern, spec


def group(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; help shows them in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


# Of every command that converts: which matrices, and exceptions.
selection_options = group(
    click.option(
        "--input-factors", metavar="SPEC", help="Factors of the input matrices W_ih too; they stay dense without."
    ),
    click.option("--only", metavar="GLOB", multiple=True, help="Factor only layers or matrices that match."),
    click.option(
        "--skip", metavar="GLOB", multiple=True, help="Do not factor what matches; --dtype still applies to it."
    ),
    click.option(
        "--set",
        "overrides",
        metavar="GLOB=SPEC",
        type=GlobSpec(),
        multiple=True,
        help="Factors for what matches, or 'dense'.",
    ),
)

# Where the parts of a search run; `given` makes one option of them.
ray_options = group(
    click.option("--ray", is_flag=True, default=None, help="Run what is independent as tasks of Ray.  [default: here]"),
    click.option(
        "--ray-address", metavar="ADDRESS", help="The cluster to run them on.  [default: one on this machine]"
    ),
)


class File(click.types.StringParamType):
    """The name of a file, which shells complete; what reads or writes it says whether it can."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


FILE = File()

model_argument = click.argument("model", metavar="MODEL", type=FILE)
key_option = click.option("--key", metavar="NAME", help="The entry of the file that holds the state dict, if several.")
task_option = click.option("--task", metavar="TASK", required=True, help="Built-in name or path/to/file.py:Name.")
output_option = click.option("-o", "--output", metavar="OUT", type=FILE, required=True, help="File to write.")
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
lr_option = click.option(
    "--lr",
    type=NUMBER,
    help="Peak learning rate of AdamW.  [default: 0.006; from scratch 0.002; compress and sweep try 0.006 and 0.002]",
)
device_option = click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1.  [default: a GPU if there is one]")

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8", "int4"]),
    help="How the file stores weights; int8 and int4 have one scale a row.  [default: as MODEL does]",
)
form_option = click.option(
    "--form",
    type=click.Choice(["folded", "scan", "auto"]),
    default="folded",
    show_default=True,
    help="Of recurrent nodes in a whole ONNX graph: dense weights again when it is loaded; factors step by step in a "
    "Scan; the faster of both here.",
)
keep_option = click.option(
    "--keep",
    metavar="GLOB",
    multiple=True,
    help="Store in float32 what matches, whatever --dtype says, factored or not.",
)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line; the others keep the defaults of what is called."""
    chosen = {name: value for name, value in options.items() if value is not None and value != ()}
    if "ray_address" in chosen:
        chosen["ray"] = chosen.pop("ray_address")
    return chosen | ({"overrides": dict(chosen["overrides"])} if "overrides" in chosen else {})
