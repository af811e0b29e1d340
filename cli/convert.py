"""`kruify convert MODEL --factors SPEC`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output, progress
from .options import (
    NUMBER,
    dtype_option,
    form_option,
    keep_option,
    key_option,
    model_argument,
    seed_option,
    selection_options,
)

if TYPE_CHECKING:
    from kruify.conversion import Conversion

LOSSLESS = 1e-3
"""||W-K|| / ||W|| below this is rounding, of half precision at most."""
LITTLE = 0.1
"""Energy kept below which little of the trained network is left: one balanced product keeps 1 to 3 % of the matrices of
g2p-en, low rank at 16x fewer numbers 30 %."""


@click.command()
@model_argument
@click.option("--factors", metavar="SPEC", help="Factors of every recurrent matrix, such as 4*(16x16,16x16), or auto.")
@click.option(
    "-o",
    "--output",
    "target",
    metavar="OUT",
    help="File to write; of MODEL.onnx, OUT.onnx is its whole graph.  [default: MODEL.kru.safetensors beside it]",
)
@click.option(
    "--budget",
    metavar="B",
    help="Choose the factors: 10x, params=25%, macs=10%, or params=8x,macs=50%; size=8x or size=600kB: of W_ih, too, "
    "so that the whole file, in int8, is no larger; latency=3x: so that the layers take a third of the time here.",
)
@click.option("--input-budget", metavar="B", help="The same for the input matrices W_ih.")
@click.option("--max-error", type=NUMBER, metavar="E", help="Bound on the error ||W-K||/||W|| of each gate.")
@selection_options
@click.option("--task", metavar="TASK", help="Run MODEL on this task's data first, to weigh errors by its activations.")
@click.option("--subclasses", is_flag=True, help="In whole modules, take subclasses of nn.LSTM and friends for these.")
@click.option("--plan", metavar="FILE", help="Take the plan from this JSON file.")
@click.option("--plan-out", metavar="FILE", help="Write the plan as JSON, to be edited and given to --plan.")
@dtype_option
@keep_option
@form_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, with a budget what was found; write nothing.")
@seed_option
@key_option
@json_option
def convert(
    model: str,
    target: str | None,
    overrides: tuple[tuple[str, str], ...],
    plan_out: str | None,
    key: str | None,
    json_only: bool,
    **options: Any,
) -> None:
    """Put sums of Kronecker products in place of recurrent matrices.

    SPEC is a factor spec: 2x2 | 32x32,16x16 | 4*(32x32,16x16)+8*(512x1,1x512) | ...+diag | ...+sparse:2% |
    auto | auto:3 | stacked:SPEC (all gates of a layer as one matrix). A GLOB is matched with layer names (encoder),
    matrix names (encoder.weight_hh_l0) and gate names (encoder.weight_hh_l0.r).

    Conversion alone destroys a trained network's accuracy; `kruify finetune` brings it back.
    """
    if options["input_budget"] is not None and options["budget"] is None and options["max_error"] is None:
        raise click.UsageError("--input-budget goes with a budget: --budget or --max-error")
    if all(options[name] is None for name in ("plan", "factors", "budget", "max_error")):
        raise click.UsageError("say how to factor: --factors SPEC (for example auto), --budget 10x or --plan FILE")
    with output(json_only) as out:
        from kruify.checkpoint import atomic_file, check_target, read
        from kruify.conversion import pipeline
        from kruify.reporting.converted import converted

        checkpoint = read(model, key=key, graph=(target or "").lower().endswith(".onnx"))
        path = pipeline.default_output(model) if target is None else Path(target)
        if plan_out is not None:
            check_target(plan_out, *checkpoint.files, *([] if options["dry_run"] else [path]))
        for sentence in checkpoint.notes:
            out.note(f"note: {sentence}")
        with progress("converting") as advance:
            done = pipeline.convert(checkpoint, output=path, overrides=dict(overrides), progress=advance, **options)
        if plan_out is not None:
            with atomic_file(plan_out) as file:
                file.write((done.plan.to_json(indent=2) + "\n").encode())
        out.show(*converted(model, done))
        if options["dry_run"]:
            searched = options["budget"] is not None or options["max_error"] is not None
            found = "these factors were found and fitted, nothing was" if searched else "nothing was decomposed or"
            out.show(f"Dry run: {found} written.")
        else:
            _advise(out, model, done, options["budget"])
            if options["dtype"] == "int4" and options["task"] is None:
                out.show("Rounded to the nearest of four bits: --task TASK makes less of an error (docs/int8.md).")
        out.result(done.to_json())


def _advise(out: Output, model: str, conversion: Conversion, budget: str | None) -> None:
    from rich.text import Text

    out.show(f"wrote {conversion.output}")
    if conversion.graph is not None:
        out.show(*map(str, conversion.forms), str(conversion.graph))
    if not conversion.matrices:
        return
    if conversion.parameters.recurrent_ratio <= 1:
        rows, cols = conversion.matrices[0].shape
        out.show(
            f"Nothing became smaller. Low rank fits every size, prime ones too: "
            f"--factors '{max(1, cols // 32)}*({rows}x1,1x{cols})'"
        )
    if all(gate.relative_error < LOSSLESS for gate in conversion.matrices):
        out.show("The factors keep all of every matrix: it computes what the dense model does.")
        return
    kept = sum(gate.energy for gate in conversion.matrices) / len(conversion.matrices)
    if kept < LITTLE:
        how = "give it many epochs, and compare with --budget 16x"
        if conversion.graph is not None:
            how = "give it many --steps, and compare with a larger budget"
        out.show(
            f"The factors keep {100 * kept:.1f} % of the energy of these matrices, so that training begins almost "
            f"anew:\n{how}."
        )
    if all(gate.terms == 1 and "+" not in gate.factors for gate in conversion.matrices):
        fewest = min(conversion.matrices, key=lambda gate: gate.parameters_after / gate.parameters_before)
        out.show(
            f"One product stands for each gate, {fewest.parameters_after:,} numbers for {fewest.parameters_before:,}: "
            "trained, too, it may stay behind the dense\nnetwork (README.md, Which factors)."
        )
    again = f"kruify finetune {conversion.output} --task TASK -o OUT"
    if conversion.graph is not None:
        size = budget if budget is not None and budget.startswith("size=") else "size=8x"
        again = f"kruify compress {model} --inputs SAMPLES --budget {size} -o OUT.onnx    (docs/onnx.md)"
    out.show(
        Text.assemble(
            ("Not ready to use:", "bold"),
            " conversion alone destroys accuracy, because trained recurrent\n"
            f"matrices have little Kronecker structure. Training brings it back:\n  {again}",
        )
    )
