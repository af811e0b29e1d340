"""`kruify finetune MODEL --task TASK -o OUT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output, progress
from .options import key_option, model_argument, network, seed_option, task_option

if TYPE_CHECKING:
    from kruify.checkpoint import Checkpoint
    from kruify.finetune import FinetuneResult, Progress, Recipe
    from kruify.task import Task


@click.command()
@model_argument
@task_option
@click.option("-o", "--output", "target", metavar="OUT", required=True, help="File to write.")
@click.option("--teacher", metavar="DENSE", help="Learn from this dense checkpoint, too (distillation).")
@click.option("--distill-only", is_flag=True, help="Learn from the teacher alone, without labels.")
@click.option("--epochs", type=float, help="Passes over the train split; fractions are allowed.  [default: 5]")
@click.option("--lr", type=float, help="Peak learning rate of AdamW.  [default: 0.002]")
@click.option(
    "--unitary-penalty",
    type=float,
    metavar="L",
    help="Weight of the soft unitary penalty.  [default: on for a plain RNN, off for LSTM and GRU]",
)
@click.option(
    "--option",
    "others",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other option of kruify.finetune.Recipe, such as schedule=cosine or patience=3.",
)
@click.option("--log-dir", metavar="DIR", help="Write history.csv there, one line a validation.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to the --log-dir, too.")
@click.option("--resume", metavar="DIR", help="Keep the state of the run there, and go on from it if it has one.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1.  [default: a GPU if there is one]")
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
    log_dir: str | None,
    tensorboard: bool,
    resume: str | None,
    device: str | None,
    seed: int,
    key: str | None,
    json_only: bool,
) -> None:
    """Train MODEL on a task, keep the weights that validate best, and write them.

    A dense MODEL may be given too: a fair comparison trains the dense network as long.
    """
    options: dict[str, Any] = {"epochs": epochs, "lr": lr, "unitary_penalty": unitary_penalty}
    given = {name: value for name, value in options.items() if value is not None}
    if distill_only:
        given["distill_only"] = True
    with output(json_only) as out:
        from kruify.checkpoint import read
        from kruify.finetune import Recipe
        from kruify.finetune import finetune as run
        from kruify.task import load_task

        checkpoint = read(model, key=key)
        task = load_task(task_name)
        recipe = Recipe().changed(seed=seed, **given, **_others(others))
        net = network(checkpoint, task)
        teacher_net = network(read(teacher), task) if teacher else None
        _check_writable(Path(target))
        with progress("starting") as advance:
            outcome = run(
                net,
                task,
                teacher=teacher_net,
                recipe=recipe,
                resume=resume,
                device=device,
                on_progress=lambda now: advance(now.step, now.steps, _describe(now, task)),
                log_dir=log_dir,
                tensorboard=tensorboard,
            )
        if not outcome.is_main:  # under torchrun one process writes and prints
            return
        _write(Path(target), outcome, recipe, checkpoint)
        _show(out, target, outcome, task)
        out.result(
            {
                "output": target,
                "history": outcome.history,
                "metrics": outcome.metrics,
                "best_epoch": outcome.best_epoch,
                "steps": outcome.steps,
                "seconds": outcome.seconds,
            }
        )


def _others(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE with the value in the type of the recipe's default."""
    from kruify.errors import UsageError
    from kruify.finetune import Recipe

    defaults = Recipe().to_json()
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        default = defaults.get(name, "")
        try:
            if not equals:
                raise ValueError
            if isinstance(default, bool):
                values[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, int | float) or default is None:
                values[name] = type(default)(text) if default is not None else float(text)
            else:
                values[name] = text
        except (ValueError, KeyError):
            raise UsageError(f"--option {pair} is not {name or 'NAME'}={default}", "fine-tuning") from None
    return values


def _check_writable(path: Path) -> None:
    """Fails before the training, not after it."""
    from kruify.errors import UsageError

    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", path, "Make it first")


def _describe(now: Progress, task: Task) -> str:
    text = f"epoch {now.epoch}/{now.epochs} loss {now.loss:.3f}"
    if task.metric in now.metrics:
        text += f" {task.metric} {now.metrics[task.metric]:.3f}"
    return text


def _write(path: Path, outcome: FinetuneResult, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Writes the model with its plan, how it was trained, and the hashes of every file on the way, from the dense
    source on."""
    from kruify.checkpoint import ORIGIN, metadata_for, write_safetensors
    from kruify.convert import plan_of

    plan = plan_of(outcome.model)
    state = {name: tensor.cpu() for name, tensor in outcome.model.state_dict().items()}
    told = {"kruify.history": json.dumps(outcome.history), "kruify.recipe": json.dumps(recipe.to_json())}
    if not plan.layers:
        write_safetensors(path, state, told)
        return
    earlier = json.loads(checkpoint.metadata.get("kruify.parents", "[]"))
    source = checkpoint.metadata.get("kruify.source_sha256", "")
    parents = [*(earlier or [source]), checkpoint.sha256]
    extra = {"kruify.parents": json.dumps(parents), ORIGIN: checkpoint.metadata.get(ORIGIN, ""), **told}
    metadata = metadata_for(plan.to_json(), source_sha256=source, seed=recipe.seed, extra=extra)
    write_safetensors(path, state, metadata)


def _show(out: Output, target: str, outcome: FinetuneResult, task: Task) -> None:
    from rich.table import Table

    names = list(outcome.metrics)
    table = Table(title=f"{outcome.steps} steps in {outcome.seconds:.0f} s, validation split", title_justify="left")
    for heading in ("epoch", "step", "training loss", *names):
        table.add_column(heading, justify="right")
    for entry in outcome.history:
        values: dict[str, Any] = entry["metrics"]
        best = " *" if entry["epoch"] == outcome.best_epoch else ""
        loss = "" if entry["loss"] is None else f"{entry['loss']:.4f}"
        table.add_row(f"{entry['epoch']}{best}", f"{entry['step']}", loss, *(f"{values[name]:.4f}" for name in names))
    out.show(table, f"wrote {target}: the weights of epoch {outcome.best_epoch} (*), {_metrics(outcome, task)}")


def _metrics(outcome: FinetuneResult, task: Task) -> str:
    value = outcome.metrics.get(task.metric)
    return "" if value is None else f"{task.metric} {value:.4f} on the validation split"
