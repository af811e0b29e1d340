"""`kruify inspect MODEL`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output
from .options import FILE, key_option

if TYPE_CHECKING:
    from kruify.conversion.inspection import FileFacts, Inspection
    from kruify.conversion.locate import RecurrentLayer


STORED = {"sum": "added up in the bias_ih beside them", "sum+n": "added up in the bias_ih beside them, but for b_hn"}
OWN = ("torch.", "__torch__.torch.", "collections.", "builtins.")  # code of torch and Python, not the user's


@click.command()
@click.argument("model", metavar="[MODEL]", required=False, type=FILE)
@click.option("--backend", is_flag=True, help="Say what the layers run on here: compiled kernels, or the reference.")
@key_option
@json_option
def inspect(model: str | None, backend: bool, key: str | None, json_only: bool) -> None:
    """Show what is in MODEL: what can be converted, what not and why."""
    if model is None and not backend:
        raise click.UsageError("name a MODEL, or give --backend")
    with output(json_only) as out:
        about: dict[str, Any] = {}
        if backend:
            from kruify.ops import backend_info

            about = {"backend": backend_info()}
            out.show("\n".join(f"{name:9}{value}" for name, value in about["backend"].items()))
        if model is None:
            out.result(about)
            return
        from kruify.checkpoint import read
        from kruify.conversion import inspect as look

        checkpoint = read(model, key=key)
        inspection = look(checkpoint)
        for sentence in checkpoint.notes:
            out.note(f"note: {sentence}")
        _show(out, model, inspection)
        out.result({**about, **inspection.to_json()})


def _show(out: Output, model: str, inspection: Inspection) -> None:
    from kruify.reporting.terminal import table as titled

    heading = f"{model}: {inspection.format}, {inspection.parameters:,} parameters"
    caption = "parameters in recurrent matrices (W_hh) and input matrices (W_ih); share of W_hh in the whole model"
    table = titled(heading, "layer", "kind", "sizes", "recurrent", "input", "of all", words=3, caption=caption)
    for row in inspection.summaries:
        table.add_row(
            row.layer.name or "(the model itself)",
            row.layer.kind + ("cell" if row.layer.cell else ""),
            _sizes(row.layer),
            f"{row.recurrent_parameters:,}",
            f"{row.input_parameters:,}",
            f"{row.recurrent_parameters / max(1, inspection.parameters):.1%}",
        )
    if inspection.summaries:
        out.show(table)
    else:
        out.show(f"{heading}, no recurrent layer")
    for row in inspection.summaries:
        for weight, gates in row.factors.items():
            out.show(f"{row.layer.name}.{weight}: " + ", ".join(f"{gate} = {spec}" for gate, spec in gates.items()))
    for item in inspection.beside:
        out.show(f"{item['name']}: {item['kind']} {item['rows']}x{item['columns']}, {item['factors']}")
    for name, reason in inspection.skipped:
        out.show(f"passed over {name}: {reason}")
    if inspection.file is not None:
        _show_file(out, inspection.file)


def _show_file(out: Output, file: FileFacts) -> None:
    out.show(f"{file.bytes:,} bytes")
    if file.key:
        out.show(f"the state dict stands under {file.key}")
    if file.prefix:
        out.show(f"names begin with {file.prefix}, which is put back in what is written")
    for line in _ties(file.ties):
        out.show(line)
    for dtype in sorted(set(file.storage.values())):
        stored = [name for name, kind in file.storage.items() if kind == dtype]
        weights = "1 weight is" if len(stored) == 1 else f"{len(stored)} weights are"
        out.show(f"{weights} stored {STORED.get(dtype, f'as {dtype}')}: {', '.join(stored[:10])}")
    for name in file.computed:
        out.show(f"{name} is computed from its parametrisation")
    if foreign := [name for name in file.globals if not name.startswith(OWN)]:
        out.show(f"names code that was not run: {', '.join(foreign[:10])}")
    for name, count in file.nonfinite.items():
        out.show(f"{name} has {count:,} {'entry that is' if count == 1 else 'entries that are'} NaN or infinite")


def _ties(ties: Mapping[str, str]) -> Iterator[str]:
    """What is tied; the weights that one layer has from another are named once, together."""
    layers: dict[tuple[str, str], list[str]] = {}
    for second, first in ties.items():
        (owner, _, weight), (other, _, same) = second.rpartition("."), first.rpartition(".")
        if owner and other and weight == same:
            layers.setdefault((owner, other), []).append(weight)
        else:
            yield f"{second} is tied to {first}"
    for (owner, other), weights in layers.items():
        if len(weights) > 1:
            yield f"tied are {', '.join(weights)} of\n  {owner} to those of\n  {other}"
        else:
            yield f"{owner}.{weights[0]} is tied to {other}.{weights[0]}"


def _sizes(layer: RecurrentLayer) -> str:
    text = f"{layer.input_size} -> {layer.hidden_size}"
    if layer.num_layers > 1:
        text += f", {layer.num_layers} layers"
    if layer.bidirectional:
        text += ", bidirectional"
    if layer.proj_size:
        text += f", projected to {layer.proj_size}"
    return text if layer.bias else f"{text}, no bias"
