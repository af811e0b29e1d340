"""`kruify export MODEL --to dense|onnx|torch|c -o OUT`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .console import json_option, output, progress
from .options import NUMBER, form_option, given, key_option, model_argument, output_option

if TYPE_CHECKING:
    from kruify.exporting import Exported

OPTIONS = {
    "tanh": "RNNs with tanh (else --nonlinearity relu)",
    "time before batch": "input as (time, batch, features) (else --batch-first)",
}
"""What may be assumed -> how it is said, with the option for the other case."""


@click.command()
@model_argument
@click.option("--to", type=click.Choice(["dense", "onnx", "torch", "c"]), required=True, help="What to write.")
@output_option
@click.option("--task", metavar="TASK", help="Export the task's whole network, not layer by layer.")
@click.option("--dense", is_flag=True, help="Write dense matrices instead of factors (ONNX's own LSTM, GRU, RNN).")
@click.option("--batch-first/--time-first", default=None, help="Layout of the layers' input.  [default: the layer's]")
@click.option(
    "--nonlinearity",
    type=click.Choice(["tanh", "relu"]),
    help="Of plain RNNs, where the file does not tell.  [default: tanh]",
)
@click.option("--original", metavar="FILE", help="The file that was converted, to write its kind again (ONNX, Keras).")
@form_option
@click.option("--tolerance", type=NUMBER, metavar="X", help="Largest difference allowed.  [default: 1e-5]")
@key_option
@json_option
def export(model: str, json_only: bool, **options: Any) -> None:
    """Write MODEL in a form that runs without kruify, and compare it.

    \b
    dense  for nn.LSTM, nn.GRU, nn.RNN: the kind of file that was converted, or a state dict (.pt, .safetensors)
    onnx   each recurrent layer as an ONNX model: inputs input, h_0 (, c_0) and, if wanted, lengths of padded sequences;
           outputs output, h_n (, c_n); with --original FILE.onnx the whole graph, small weights in place of its own
    torch  the same as torch.export programs (.pt2), without lengths: every step counts
    c      each recurrent layer as one C99 file without dependencies, weights in eight bits: NAME_init, NAME_step

    Factors stay factors, batch and time are dynamic. Several layers give several files: OUT with the layer's name
    before its ending. What was written is run and compared with the layers; a file that differs by more than the
    tolerance is deleted, and the exit code is 6.
    """
    to, task = options["to"], options["task"]
    layout = options["batch_first"] is not None or options["nonlinearity"] is not None
    if to == "dense" and (options["dense"] or task or layout):
        raise click.UsageError("--to dense writes a state dict: no --dense, --task, --batch-first or --nonlinearity")
    if to == "torch" and options["original"]:
        raise click.UsageError("--original goes with --to dense and --to onnx")
    if to == "onnx" and options["original"] and (options["dense"] or task or layout or options["tolerance"]):
        raise click.UsageError("--to onnx --original writes the original's graph: only --form goes with it")
    if to == "c" and (task or options["original"] or options["batch_first"] is not None):
        raise click.UsageError("--to c writes the recurrent layers: no --task, --original or --batch-first")
    if task and layout:
        raise click.UsageError("with --task the network tells: no --batch-first or --nonlinearity")
    with output(json_only) as out:
        from kruify.api import export as run

        with progress("exporting and comparing") as advance:
            files = run(model, progress=advance, **given(**{**options, "dense": options["dense"] or None}))
        for file in files:
            out.show(_sentence(file), *map(str, file.forms))
        if assumed := sorted({OPTIONS.get(item, item) for file in files for item in file.assumed}):
            out.note(f"The file does not tell, so it was taken for granted: {'; '.join(assumed)}")
        if narrow := sorted({dtype for file in files for dtype in file.widened}):
            out.show(f"Weights that the model stores as {' and '.join(narrow)} are written in full, as float32.")
        out.result({"outputs": [file.to_json() for file in files]})


def _sentence(file: Exported) -> str:
    if file.graph is not None:
        return f"wrote {file.path}, {file.bytes:,} bytes; {file.graph}"
    inputs = [*file.inputs, *(f"[{name}]" for name in file.optional)]
    names = f": ({', '.join(inputs)}) -> ({', '.join(file.outputs)})" if file.inputs else ""
    taken = file.embedded
    memory = (
        ""
        if taken is None
        else (
            f"; flash {taken.flash:,} bytes and the code, RAM {taken.ram:,} bytes a stream; "
            f"eight-bit weights change its outputs by up to {taken.rounding:.2g}"
        )
    )
    return (
        f"wrote {file.path}, {file.bytes:,} bytes{names}; run and compared on {file.cases} inputs: "
        f"largest difference {file.difference:.1g}{memory}{_slower(file)}"
    )


def _slower(file: Exported) -> str:
    """What is said of factors that take longer in onnxruntime than dense weights."""
    timing = None if file.beside_dense is None else file.beside_dense.timing
    if timing is None or not timing.slower:
        return ""
    dense, factors = timing.run_ms
    return f"; it takes {factors / dense:.1f} times as long as dense weights in onnxruntime, which --dense writes"
