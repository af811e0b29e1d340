"""`kruify compress MODEL --task TASK --budget 16x [--max-drop 0.01] -o OUT`, or `MODEL.onnx ... --inputs SAMPLES`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .compress_inputs import compress_inputs, nearest_of, write_card
from .console import Output, json_option, output, progress
from .options import (
    DROP,
    FILE,
    NUMBER,
    device_option,
    dtype_option,
    form_option,
    keep_option,
    key_option,
    lr_option,
    output_option,
    ray_options,
    seed_option,
    selection_options,
)
from .training import log_dir_option, others_option, recipe_options, resume_option, share_option

if TYPE_CHECKING:
    from kruify.search.candidates import CandidateResult
    from kruify.search.compression import Attempt, Compression
    from kruify.tasks.base import Task


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=FILE)
@click.option(
    "--task",
    metavar="TASK",
    help="Built-in name or path/to/file.py:Name; with --inputs a function path/to/file.py:metric, which gives a number "
    "for the path of an ONNX file, or of a folder with several.",
)
@click.option(
    "--inputs",
    metavar="SAMPLES",
    help="An ONNX graph without labels: a folder of .npz files, each one sample by the names of the inputs, or "
    "path/to/file.py:function, which yields such dicts.",
)
@click.option(
    "--budget",
    metavar="B",
    required=True,
    help="size=8x or size=600kB: the whole file, in int8 or int4; latency=3x: the time of the layers here; or 16x, "
    "params=10%, macs=10%, params=8x,macs=50% of recurrent matrices.",
)
@click.option(
    "--max-drop",
    type=DROP,
    metavar="D",
    help="How much worse the task's metric may get: 0.01, in its own units, or 1%, of what MODEL has; with --inputs "
    "and no --task the relative error of the outputs.",
)
@click.option(
    "--attempts",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="At most so many rounds of fine-tuning.",
)
@click.option("--epochs", type=NUMBER, help="Passes over the train split in each round.  [default: 5]")
@click.option("--steps", type=click.IntRange(0, 10**6), help="With --inputs: steps for each layer.  [default: 600]")
@click.option(
    "--run",
    is_flag=True,
    help="With --inputs: MODEL is a TorchScript or Keras file, a program that runs here with your rights.",
)
@click.option(
    "--dry-run", is_flag=True, help="With --inputs: say what would be done and how long it takes; write nothing."
)
@share_option
@selection_options
@lr_option
@others_option
@log_dir_option
@ray_options
@resume_option
@device_option
@dtype_option
@keep_option
@form_option
@output_option
@click.option("--card", metavar="FILE", help="Write a model card: Markdown with front matter for the Hugging Face Hub.")
@seed_option
@key_option
@json_option
def compress(
    models: tuple[str, ...],
    task: str | None,
    inputs: str | None,
    steps: int | None,
    run: bool,
    dry_run: bool,
    form: str,
    card: str | None,
    others: tuple[str, ...],
    json_only: bool,
    **options: Any,
) -> None:
    """Plan, convert, fine-tune and evaluate in one go.

    Two candidates, the structure that keeps the most energy and one that is half low rank, half single entries, are
    each trained for a short while; the one that validates better is taken. Under a size both keep the
    most energy, one in int8, one with more numbers in int4, and factor the input matrices, too. Then the better one is
    tried at a third of the learning rate, unless --lr is given.

    With --max-drop, layers that cost too much get more parameters, or stay dense, until the network loses no more than
    that on the validation split. If it cannot be reached the nearest network is written all the same, and the exit
    code is 6.

    With --inputs an ONNX graph becomes small without labels or code: its recurrent matrices low rank, each layer
    trained alone to give what it gave on the samples, then all together to give the outputs of the graph, all constants
    in int8; one sample in eight is held out, and the outputs of both graphs are compared on it. Several graphs run one
    after the other, outputs of one being inputs of the next by name; they share one budget, and OUT is a folder.

    With --inputs and --run a TorchScript archive or a Keras model is run, and OUT is the converted file, its layers
    trained alone.
    """
    if inputs is not None:
        of_graphs = {"steps": steps, "dry_run": dry_run, "form": form, "card": card, "others": others}
        compress_inputs(models, inputs, task, run, json_only, {**options, **of_graphs})
        return
    with output(json_only) as out:
        from kruify.api import compress as compressed
        from kruify.checkpoint import check_target, read
        from kruify.errors import TargetMissedError, UsageError
        from kruify.reporting import to_card
        from kruify.reporting.build import report
        from kruify.reporting.converted import counts
        from kruify.tasks.evaluation import Evaluations
        from kruify.tasks.loader import load_task

        if task is None:
            what = "it needs a task, or samples of the inputs of an ONNX, TorchScript or Keras model"
            raise UsageError(what, "compress", "Give --task TASK or --inputs SAMPLES")
        if steps is not None or run or form != "folded":
            raise UsageError("--steps, --run and --form go with --inputs", "compress", "Give --inputs SAMPLES")
        if dry_run:
            what = "--dry-run goes with --inputs"
            raise UsageError(what, "compress", f"kruify convert {models[0]} --budget ... --dry-run shows a plan")
        if len(models) > 1:
            raise UsageError("several graphs go together only with --inputs", "compress", "Name one MODEL")
        model = models[0]
        if card is not None:
            check_target(card, model, options["output"])
        found = load_task(task)
        checkpoint = read(model, key=options["key"])
        made = None
        with progress(f"reading {model}") as advance:
            done = compressed(
                checkpoint,
                found,
                progress=advance,
                on_candidate=lambda result: out.note(_candidate(result, found)),
                on_attempt=lambda attempt: out.note(_line(attempt, checkpoint.weight_bytes, found)),
                **recipe_options(others, options),
            )
            if card is None:
                metrics = Evaluations(found, advance).measure(done.model, "test")
            else:
                made = report(model, options["output"], task=task, key=options["key"], progress=advance)
                metrics = made.models[1].metrics
        before, after = checkpoint.weight_bytes, Path(options["output"]).stat().st_size
        out.show(counts("whole file", before, after, "bytes"), *map(str, done.slack))
        _show(out, done, before, found, metrics, options["output"])
        if (timed := done.latency) is not None:
            out.show(
                f"its layers take {timed['ratio']:.1f}x less time, {timed['wanted']:g}x asked for: "
                f"{timed['dense_ms']:.3f} -> {timed['ms']:.3f} ms"
            )
        if card is not None and made is not None:
            write_card(out, card, to_card(made))
        size = {"before": before, "after": after, "ratio": before / after}
        out.result({"output": options["output"], **done.to_json(), "metrics": metrics, "bytes": size})
        if not done.within:
            nearest = done.attempts[done.best]
            raise TargetMissedError(
                f"{nearest_of(done.attempts)} loses {nearest.drop:.4f} {found.metric} at "
                f"{_smaller(nearest, before):.1f}x, more than {done.allowed:.4g}",
                options["output"],
                "Allow more epochs, more attempts, a smaller reduction or a larger drop",
            )


def _candidate(result: CandidateResult, task: Task) -> str:
    factors = ", ".join(result.factors) or "dense"
    stored = f" in {result.dtype}" if result.dtype else ""
    return f"candidate {factors}{stored} at rate {result.lr:g}: {task.metric} {result.metrics[task.metric]:.4f}"


def _line(attempt: Attempt, before: int, task: Task) -> str:
    smaller = f"{_smaller(attempt, before):.1f}x smaller"
    return f"{smaller}: {task.metric} worse by {attempt.drop:.4f} on the validation split"


def _smaller(attempt: Attempt, before: int) -> float:
    """How many times: the whole file, of `before` bytes, where the budget is of bytes, else the recurrent matrices."""
    return attempt.recurrent_ratio if attempt.bytes is None else before / attempt.bytes


def _show(out: Output, done: Compression, before: int, task: Task, metrics: dict[str, float], target: str) -> None:
    from kruify.reporting.terminal import table as titled

    counted = "recurrent parameters" if done.attempts[0].bytes is None else "bytes of the file"
    columns = (counted, "smaller", task.metric, "worse by")
    table = titled(f"validation split, {task.metric}", "attempt", *columns, words=0)
    table.add_row("dense", "", "", f"{done.baseline[task.metric]:.4f}", "")
    for i, attempt in enumerate(done.attempts):
        table.add_row(
            f"{i + 1}{' *' if i == done.best else ''}",
            f"{attempt.recurrent_after if attempt.bytes is None else attempt.bytes:,}",
            f"{_smaller(attempt, before):.1f}x",
            f"{attempt.metrics[task.metric]:.4f}",
            f"{attempt.drop:.4f}",
        )
    figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    out.show(table, f"wrote {target} (*): {figures} on the test split")
