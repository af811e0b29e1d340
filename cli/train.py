"""`kruify train --task TASK --cell kru|... --hidden N`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import json_option, output, progress
from .options import NUMBER, given, lr_option, seed_option, task_option
from .training import draw_conditioning, recipe_options, show, training_options

if TYPE_CHECKING:
    from kruify.tasks.base import Task
    from kruify.training import Recipe


@click.command()
@task_option
@click.option("--cell", metavar="CELL", help="kru, kru-real, kru-lstm, kru-gru, kru-rnn, lstm, gru, rnn.")
@click.option("--hidden", type=click.IntRange(1), metavar="N", help="Hidden size of each recurrent layer.")
@click.option("--factors", metavar="SPEC", help="Factors of the recurrent matrices of a kru cell.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="Recurrent layers.")
@click.option("-o", "--output", "target", metavar="OUT", help="File to write.  [default: TASK-CELL-N.safetensors]")
@click.option("--epochs", type=NUMBER, help="Passes over the train split; fractions are allowed.  [default: 5]")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of --epochs.")
@lr_option
@click.option(
    "--penalty",
    "--unitary-penalty",
    "penalty",
    type=NUMBER,
    metavar="L",
    help="Weight of the soft unitary penalty.  [default: 0.01 for a plain RNN and a KRU, 0 for LSTM and GRU]",
)
@training_options
@seed_option
@json_option
def train(
    task_name: str,
    cell: str | None,
    hidden: int | None,
    factors: str | None,
    layers: int | None,
    target: str | None,
    epochs: float | None,
    steps: int | None,
    lr: float | None,
    penalty: float | None,
    others: tuple[str, ...],
    conditioning: str | None,
    log_dir: str | None,
    tensorboard: bool,
    resume: str | None,
    device: str | None,
    seed: int,
    json_only: bool,
) -> None:
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
    if epochs is not None and steps is not None:
        raise click.UsageError("--epochs and --steps say the same thing twice; give one")
    with output(json_only) as out:
        import torch

        from kruify.analysis.counts import count_network
        from kruify.checkpoint import check_model_target, check_target
        from kruify.conversion.network import network_of
        from kruify.errors import UsageError
        from kruify.tasks.base import fresh_model
        from kruify.tasks.loader import load_task
        from kruify.training import Recipe, finetune
        from kruify.training.output import write_trained

        task = load_task(task_name, **given(cell=cell, hidden=hidden, factors=factors, layers=layers))
        network = network_of(task)
        if factors is not None and not str(network.get("cell", "kru")).startswith("kru"):
            raise UsageError(f"a cell '{network['cell']}' has no factors", "--factors", "Leave --factors out")
        options = recipe_options(others, seed=seed, epochs=epochs, lr=lr, unitary_penalty=penalty)
        recipe = Recipe.from_scratch().changed(**options)
        if steps is not None:
            recipe = recipe.changed(epochs=steps / _steps_per_epoch(task, recipe))
        path = Path(target or _default_name(task_name, network))
        check_model_target(path)
        if conditioning is not None:
            check_target(conditioning, path)
        torch.manual_seed(seed)
        with progress("starting") as advance:
            outcome = finetune(
                fresh_model(task),
                task,
                recipe=recipe,
                resume=resume,
                device=device,
                progress=advance,
                conditioning=conditioning is not None,
                log_dir=log_dir,
                tensorboard=tensorboard,
            )
        if not outcome.is_main:  # under torchrun one process writes and prints
            return
        write_trained(path, outcome, recipe, network=network)
        show(out, str(path), outcome, task)
        if task.chance:
            out.show(f"a network that learnt nothing: {task.chance}")
        if conditioning is not None:
            draw_conditioning(out, conditioning, outcome)
        out.result(
            {
                "output": str(path),
                "task": task_name,
                "network": network,
                "parameters": vars(count_network(outcome.model)),
                **outcome.to_json(),
            }
        )


def _steps_per_epoch(task: Task, recipe: Recipe) -> int:
    from kruify.training.batches import count_batches

    together = recipe.accumulate * int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's number of processes
    return math.ceil(count_batches(task, recipe.seed) / together)


def _default_name(task_name: str, network: dict[str, Any]) -> str:
    from kruify.tasks.loader import task_class

    base = task_name.partition(":")[0]
    if base.endswith(".py"):
        base = task_class(task_name).__name__
    parts = [base, *(str(network[name]) for name in ("cell", "hidden") if name in network)]
    return "-".join(parts) + ".safetensors"
