"""`kruify train --task TASK --cell kru|... --hidden N`."""

from __future__ import annotations

from typing import Any

import click

from .console import json_option, output, progress
from .options import NUMBER, given, lr_option, seed_option, task_option
from .training import recipe_options, show, training_options


@click.command()
@task_option
@click.option("--cell", metavar="CELL", help="kru, kru-real, kru-lstm, kru-gru, kru-rnn, lstm, gru, rnn.")
@click.option("--hidden", type=click.IntRange(1, 1 << 24), metavar="N", help="Hidden size of each recurrent layer.")
@click.option("--factors", metavar="SPEC", help="Factors of the recurrent matrices of a kru cell.")
@click.option("--layers", type=click.IntRange(1, 1024), metavar="N", help="Recurrent layers.")
@click.option("-o", "--output", metavar="OUT", help="File to write.  [default: TASK-CELL-N.safetensors]")
@click.option("--epochs", type=NUMBER, help="Passes over the train split; fractions are allowed.  [default: 5]")
@click.option("--steps", type=click.IntRange(1, 10**9), help="Optimiser steps, instead of --epochs.")
@lr_option
@click.option(
    "--penalty",
    "--unitary-penalty",
    "unitary_penalty",
    type=NUMBER,
    metavar="L",
    help="Weight of the soft unitary penalty.  [default: 0.01 for a plain RNN and a KRU, 0 for LSTM and GRU]",
)
@training_options
@seed_option
@json_option
def train(task: str, others: tuple[str, ...], json_only: bool, **options: Any) -> None:
    """Train a network from scratch on a task.

    \b
    kru       the unit as published: complex state, complex unitary factors, modReLU
    kru-real  the same with a real state
    kru-lstm  an LSTM whose gates have Kronecker recurrent matrices; so kru-gru, kru-rnn
    lstm      torch's own; so gru, rnn

    What --cell, --hidden, --factors and --layers leave out is the task's default. A task of your own takes them as
    arguments of its constructor. The file says which network it holds: evaluate, report and finetune need the task's
    name alone.
    """
    if options["epochs"] is not None and options["steps"] is not None:
        raise click.UsageError("--epochs and --steps say the same thing twice; give one")
    with output(json_only) as out:
        from kruify.analysis.counts import count_network
        from kruify.api import train as run
        from kruify.conversion.network import network_of
        from kruify.errors import UsageError
        from kruify.tasks.loader import load_task

        wanted = given(**{name: options.pop(name) for name in ("cell", "hidden", "factors", "layers")})
        found = load_task(task, **wanted)
        network = network_of(found)
        if "factors" in wanted and not str(network.get("cell", "kru")).startswith("kru"):
            raise UsageError(f"a cell '{network['cell']}' has no factors", "--factors", "Leave --factors out")
        told = recipe_options(others, {**options, "output": options["output"] or _default_name(task, network)})
        with progress(f"making a network of {task}") as advance:
            outcome = run(found, progress=advance, **told)
        if not outcome.is_main:  # under torchrun one process writes and prints
            return
        show(out, outcome, found, told)
        if found.chance:
            out.show(f"a network that learnt nothing: {found.chance}")
        out.result(
            {
                "output": told["output"],
                "task": task,
                "network": network,
                "parameters": vars(count_network(outcome.model)),
                **outcome.to_json(),
            }
        )


def _default_name(task: str, network: dict[str, Any]) -> str:
    from kruify.tasks.loader import task_class

    base = task.partition(":")[0]
    if base.endswith(".py"):
        base = task_class(task).__name__
    parts = [base, *(str(network[name]) for name in ("cell", "hidden") if name in network)]
    return "-".join(parts) + ".safetensors"
