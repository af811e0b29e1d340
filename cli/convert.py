"""`kruify convert MODEL --factors SPEC`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output, progress
from .options import NUMBER, key_option, model_argument, network, seed_option

if TYPE_CHECKING:
    from kruify.checkpoint import Checkpoint
    from kruify.conversion import Conversion, Expected, GateCounts
    from kruify.conversion.calibration import Moments
    from kruify.conversion.locate import Located, RecurrentLayer
    from kruify.conversion.plan import Plan

LOSSLESS = 1e-3
"""||W-K|| / ||W|| below this is rounding, of half precision at most."""


@click.command()
@model_argument
@click.option("--factors", metavar="SPEC", help="Factors of every recurrent matrix, such as 4*(16x16,16x16), or auto.")
@click.option(
    "-o", "--output", "target", metavar="OUT", help="File to write.  [default: MODEL.kru.safetensors beside it]"
)
@click.option(
    "--input-factors", metavar="SPEC", help="Factors of the input matrices W_ih too; they stay dense without."
)
@click.option("--budget", metavar="B", help="Choose the factors: 10x, params=25%, macs=10%, or params=8x,macs=50%.")
@click.option("--input-budget", metavar="B", help="The same for the input matrices W_ih.")
@click.option("--max-error", type=NUMBER, metavar="E", help="Bound on the error ||W-K||/||W|| of each gate.")
@click.option("--only", metavar="GLOB", multiple=True, help="Convert only layers or matrices that match.")
@click.option("--skip", metavar="GLOB", multiple=True, help="Leave layers or matrices that match dense.")
@click.option("--set", "overrides", metavar="GLOB=SPEC", multiple=True, help="Other factors for what matches.")
@click.option(
    "--task", "task_name", metavar="TASK", help="Run MODEL on this task's data first: fit what its activations feel."
)
@click.option("--subclasses", is_flag=True, help="In whole modules, take subclasses of nn.LSTM and friends for these.")
@click.option("--plan", "plan_file", metavar="FILE", help="Take the plan from this JSON file.")
@click.option("--plan-out", metavar="FILE", help="Write the plan as JSON, to be edited and given to --plan.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; decompose and write nothing.")
@seed_option
@key_option
@json_option
def convert(
    model: str,
    factors: str | None,
    target: str | None,
    input_factors: str | None,
    budget: str | None,
    input_budget: str | None,
    max_error: float | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    overrides: tuple[str, ...],
    task_name: str | None,
    subclasses: bool,
    plan_file: str | None,
    plan_out: str | None,
    dry_run: bool,
    seed: int,
    key: str | None,
    json_only: bool,
) -> None:
    """Put sums of Kronecker products in place of recurrent matrices.

    SPEC is a factor spec: 2x2 | 32x32,16x16 | 4*(32x32,16x16)+8*(512x1,1x512) | ...+diag | ...+sparse:2% |
    auto | auto:3 | stacked:SPEC (all gates of a layer as one matrix). A GLOB is matched with layer names (encoder),
    matrix names (encoder.weight_hh_l0) and gate names (encoder.weight_hh_l0.r).

    Conversion alone destroys a trained network's accuracy; `kruify finetune` brings it back.
    """
    by_budget = budget is not None or max_error is not None
    if plan_file and (factors or input_factors or by_budget or only or skip or overrides):
        raise click.UsageError("--plan says everything; leave all other options that choose factors out")
    if by_budget and (factors or input_factors):
        raise click.UsageError("a budget chooses the factors itself; give --factors or --budget, not both")
    if input_budget and not by_budget:
        raise click.UsageError("--input-budget goes with --budget")
    if not plan_file and not factors and not by_budget:
        raise click.UsageError("say how to factor: --factors SPEC (for example auto), --budget 10x or --plan FILE")
    pairs = [_pair(item) for item in overrides]
    with output(json_only) as out:
        from kruify.api import default_output, found, refuse_converted
        from kruify.checkpoint import check_model_target, check_target, read
        from kruify.conversion import check_plan, expected
        from kruify.conversion.locate import locate_checkpoint
        from kruify.conversion.plan import make_plan
        from kruify.errors import UsageError

        checkpoint = read(model, key=key)
        refuse_converted(checkpoint)
        path = Path(target) if target else default_output(model)
        if not dry_run:
            check_model_target(path, *checkpoint.files)
        if plan_out:
            check_target(plan_out, *checkpoint.files, *([] if dry_run else [path]))
        for sentence in checkpoint.dropped:
            out.note(f"note: {sentence}")
        located = locate_checkpoint(checkpoint, subclasses=subclasses)
        layers = found(located, model)
        moments = _calibrate(checkpoint, task_name, seed) if task_name and (by_budget or not dry_run) else None
        if plan_file:
            plan = _read_plan(plan_file)
            check_plan(plan, located)
        elif by_budget:
            plan = _plan_by_budget(
                checkpoint, layers, budget, input_budget, max_error, only, skip, dict(pairs), moments, seed
            )
        else:
            plan = make_plan(layers, factors or "auto", input_factors, only, skip, dict(pairs))
        if not plan.layers:
            raise UsageError("nothing is left to convert", model, "Give --only, --skip and --set other patterns")
        if plan_out:
            _write_plan(plan_out, plan)
        result: dict[str, Any]
        if dry_run:
            account = expected(checkpoint.tensors.lazy, plan, located)
            result = _result(None, account)
            _show(out, model, result)
            out.show("Dry run: nothing was decomposed or written.")
        else:
            conversion = _convert(checkpoint, plan, located, moments, seed)
            _write(path, conversion, checkpoint, seed)
            result = _result(path, conversion)
            _show(out, model, result)
            _advise(out, path, result)
        out.result(result)


def _pair(item: str) -> tuple[str, str]:
    pattern, equals, spec = item.partition("=")
    if not equals or not pattern or not spec:
        raise click.UsageError(f"--set takes GLOB=SPEC, got '{item}'")
    return pattern, spec


def _read_plan(file: str) -> Plan:
    from kruify.conversion.plan import Plan
    from kruify.errors import UsageError

    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the plan cannot be read ({error})", file) from None
    return Plan.from_json(text, file)


def _write_plan(file: str, plan: Plan) -> None:
    from kruify.checkpoint import atomic_file

    with atomic_file(file) as handle:
        handle.write((plan.to_json(indent=2) + "\n").encode())


def _plan_by_budget(
    checkpoint: Checkpoint,
    layers: Sequence[RecurrentLayer],
    budget: str | None,
    input_budget: str | None,
    max_error: float | None,
    only: Sequence[str],
    skip: Sequence[str],
    overrides: Mapping[str, str],
    moments: Mapping[str, Moments] | None,
    seed: int,
) -> Plan:
    from kruify.conversion.budget import make_budget_plan

    with progress("choosing factors") as advance:
        return make_budget_plan(
            checkpoint.tensors.lazy,
            layers,
            budget,
            input_budget=input_budget,
            max_error=max_error,
            only=only,
            skip=skip,
            overrides=overrides,
            moments=moments,
            seed=seed,
            progress=advance,
        )


def _calibrate(checkpoint: Checkpoint, task_name: str, seed: int) -> dict[str, Moments]:
    from kruify.conversion.calibration import calibrate
    from kruify.tasks.loader import load_task

    task = load_task(task_name)
    model = network(checkpoint, task)
    batches = 16
    with progress("calibrating") as advance:
        return calibrate(model, task, batches=batches, seed=seed, progress=advance)


def _convert(
    checkpoint: Checkpoint,
    plan: Plan,
    located: Located,
    moments: dict[str, Moments] | None,
    seed: int,
) -> Conversion:
    from kruify.conversion import convert_tensors

    tensors = checkpoint.tensors.lazy
    with progress("decomposing") as advance:
        return convert_tensors(tensors, plan, located, moments=moments, seed=seed, progress=advance)


def _write(path: Path, conversion: Conversion, checkpoint: Checkpoint, seed: int) -> None:
    from kruify.checkpoint import ORIGIN, metadata_for, origin, write_model

    extra = {ORIGIN: origin(checkpoint)}  # so that `kruify export --to dense` can write the original kind again
    metadata = metadata_for(conversion.plan.to_json(), source_sha256=checkpoint.sha256, seed=seed, extra=extra)
    total, written = sum(tensor.nbytes for tensor in conversion.tensors.values()), 0
    with progress("writing") as advance:

        def more(count: int) -> None:
            nonlocal written
            written += count
            advance(written, total, "writing")

        write_model(path, conversion.tensors, metadata, progress=more)


def _result(path: Path | None, account: Conversion | Expected) -> dict[str, Any]:
    return {
        "output": None if path is None else str(path),
        "matrices": _rows(account.matrices),
        "parameters": account.parameters,
    }


def _rows(gates: Sequence[GateCounts]) -> list[dict[str, Any]]:
    """One row a gate; what only the work can tell is None in a dry run."""
    from kruify.conversion import GateResult

    keys = [field.name for field in fields(GateResult)]
    return [{key: getattr(gate, key, None) for key in keys} for gate in gates]


def _show(out: Output, model: str, result: dict[str, Any]) -> None:
    from rich.table import Table

    from kruify.factors import stacks

    specs = {m["factors"] for m in result["matrices"]}
    title = model
    if len(specs) == 1:
        title += f": {spec}" if stacks(spec := specs.pop()) else f": {spec} in every gate"
    caption = "null: the energy that an unstructured matrix of this size keeps; error: ||W - K|| / ||W||"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading in ("matrix", "gate", "size", *(["factors"] if specs else [])):
        table.add_column(heading, overflow="fold")
    columns = {"energy kept": "energy", "null": "energy_null", "error": "relative_error"}
    if any(m["energy_weighted"] is not None for m in result["matrices"]):
        columns["kept of W h"] = "energy_weighted"
    for heading in ("parameters", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in result["matrices"]:
        table.add_row(
            m["name"],
            m["gate"],
            "x".join(map(str, m["shape"])),
            *([m["factors"]] if specs else []),
            f"{m['parameters_before']:,} -> {m['parameters_after']:,}",
            *("" if m[key] is None else f"{m[key]:.3f}" for key in columns.values()),
        )
    p = result["parameters"]
    out.show(table)
    for part, words in (("recurrent", "recurrent matrices"), ("total", "whole model")):
        before, after, ratio = (p[f"{part}_{key}"] for key in ("before", "after", "ratio"))
        out.show(f"{words:18}  {before:>12,.0f} -> {after:>12,.0f} parameters, {ratio:.1f}x smaller")


def _advise(out: Output, path: Path, result: dict[str, Any]) -> None:
    from rich.text import Text

    out.show(f"wrote {path}")
    if result["parameters"]["recurrent_ratio"] <= 1:
        rows, cols = result["matrices"][0]["shape"]
        out.show(
            f"Nothing became smaller. Low rank fits every size, prime ones too: "
            f"--factors '{max(1, cols // 32)}*({rows}x1,1x{cols})'"
        )
    if all(m["relative_error"] < LOSSLESS for m in result["matrices"]):
        out.show("The factors keep all of every matrix: it computes what the dense model does.")
        return
    out.show(
        Text.assemble(
            ("Not ready to use:", "bold"),
            " trained recurrent matrices have little Kronecker structure: conversion alone\n"
            "destroys accuracy, and fine-tuning brings it back:\n"
            f"  kruify finetune {path} --task TASK -o OUT",
        )
    )
