"""`kruify finetune MODEL --task TASK -o OUT`."""

from __future__ import annotations

import click

from .console import json_option, output, progress
from .options import NUMBER, key_option, lr_option, model_argument, network, seed_option, task_option
from .training import draw_conditioning, recipe_options, show, training_options


@click.command()
@model_argument
@task_option
@click.option("-o", "--output", "target", metavar="OUT", required=True, help="File to write.")
@click.option("--teacher", metavar="DENSE", help="Learn from this dense checkpoint, too (distillation).")
@click.option("--distill-only", is_flag=True, help="Learn from the teacher alone, without labels.")
@click.option("--epochs", type=NUMBER, help="Passes over the train split; fractions are allowed.  [default: 5]")
@lr_option
@click.option(
    "--unitary-penalty",
    type=NUMBER,
    metavar="L",
    help="Weight of the soft unitary penalty.  [default: on for a plain RNN, off for LSTM and GRU]",
)
@training_options
@seed_option
@key_option
@json_option
def finetune(
    model: str,
    task_name: str,
    target: str,
    teacher: str | None,
    distill_only: bool,
    epochs: float | None,
    lr: float | None,
    unitary_penalty: float | None,
    others: tuple[str, ...],
    conditioning: str | None,
    log_dir: str | None,
    tensorboard: bool,
    resume: str | None,
    device: str | None,
    seed: int,
    key: str | None,
    json_only: bool,
) -> None:
    """Train MODEL on a task, and write the weights that validate best.

    A dense MODEL may be given too: a fair comparison trains the dense network as long.
    """
    if distill_only and not teacher:
        raise click.UsageError("--distill-only needs a teacher; name the dense network with --teacher")
    with output(json_only) as out:
        from kruify.checkpoint import check_model_target, check_target, read
        from kruify.tasks.loader import load_task
        from kruify.training import Recipe
        from kruify.training import finetune as run
        from kruify.training.output import write_trained

        checkpoint = read(model, key=key)
        # A converted MODEL has one state dict, so the key is that of its teacher.
        dense = read(teacher, key=key if checkpoint.is_kruify else None) if teacher else None
        inputs = (*checkpoint.files, *(dense.files if dense else ()))
        check_model_target(target, *inputs)
        if conditioning is not None:
            check_target(conditioning, target, *inputs)
        task = load_task(task_name)
        options = recipe_options(others, seed=seed, epochs=epochs, lr=lr, unitary_penalty=unitary_penalty)
        recipe = Recipe().changed(**options)
        if distill_only:
            recipe = recipe.changed(distill_logits=1.0, distill_until=None)
        net = network(checkpoint, task)
        teacher_net = network(dense, task) if dense else None
        with progress("starting") as advance:
            outcome = run(
                net,
                task,
                teacher=teacher_net,
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
        write_trained(target, outcome, recipe, source=checkpoint)
        show(out, target, outcome, task)
        if conditioning is not None:
            draw_conditioning(out, conditioning, outcome)
        out.result({"output": target, **outcome.to_json()})
