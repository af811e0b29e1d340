"""`kruify inspect MODEL`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output
from .options import key_option, model_argument

if TYPE_CHECKING:
    from kruify.api import Inspection


@click.command()
@model_argument
@key_option
@json_option
def inspect(model: str, key: str | None, json_only: bool) -> None:
    """Show what is inside MODEL, what would be converted, and what not and why."""
    with output(json_only) as out:
        from kruify.api import inspect_checkpoint
        from kruify.checkpoint import read

        checkpoint = read(model, key=key)
        inspection = inspect_checkpoint(checkpoint)
        for sentence in checkpoint.dropped:
            out.note(f"note: {sentence}")
        _show(out, model, inspection)
        out.result(
            {
                "layers": _layers(inspection),
                "skipped": [{"name": name, "reason": reason} for name, reason in inspection.skipped],
                "parameters": inspection.parameters,
                "format": inspection.format,
                "sha256": checkpoint.sha256,
            }
        )


def _layers(inspection: Inspection) -> list[dict[str, Any]]:
    """The layers with their parameters, and for converted ones the factors."""
    converted = {item.layer.name: item for item in inspection.plan.layers} if inspection.plan else {}
    layers = []
    for layer in inspection.layers:
        values = {**asdict(layer), "recurrent_parameters": layer.recurrent_parameters}
        layers.append({**values, "input_parameters": layer.input_parameters, "factors": {}})
    for item in converted.values():
        layer = item.layer
        counts = {"weight_hh": 0, "weight_ih": 0}
        for weight in (f"{stem}{suffix}" for suffix in layer.suffixes for stem in counts):
            rows, cols = layer.shape(weight)
            structures = item.matrices.get(weight)
            size = sum(s.parameters for s in structures) if structures else len(layer.gates) * rows * cols
            counts[weight[:9]] += size
        factors = {
            weight: dict(zip(layer.gates, map(str, structures), strict=True))
            for weight, structures in item.matrices.items()
        }
        values = {**asdict(layer), "recurrent_parameters": counts["weight_hh"]}
        layers.append({**values, "input_parameters": counts["weight_ih"], "factors": factors})
    return layers


def _show(out: Output, model: str, inspection: Inspection) -> None:
    from rich.table import Table

    layers = _layers(inspection)
    table = Table(
        title=f"{model}: {inspection.format}, {inspection.parameters:,} parameters",
        title_justify="left",
        caption="parameters in recurrent matrices (W_hh) and input matrices (W_ih); share of W_hh in the whole model",
        caption_justify="left",
    )
    for heading in ("layer", "kind", "sizes"):
        table.add_column(heading)
    for heading in ("recurrent", "input", "of all"):
        table.add_column(heading, justify="right")
    for layer in layers:
        share = layer["recurrent_parameters"] / max(1, inspection.parameters)
        table.add_row(
            layer["name"] or "(the model itself)",
            layer["kind"] + ("cell" if layer["cell"] else ""),
            _sizes(layer),
            f"{layer['recurrent_parameters']:,}",
            f"{layer['input_parameters']:,}",
            f"{share:.1%}",
        )
    if layers:
        out.show(table)
    else:
        out.show(f"{model}: {inspection.format}, {inspection.parameters:,} parameters, no recurrent layer")
    for layer in layers:
        for weight, gates in layer["factors"].items():
            out.show(f"{layer['name']}.{weight}: " + ", ".join(f"{gate} = {spec}" for gate, spec in gates.items()))
    for name, reason in inspection.skipped:
        out.show(f"passed over {name}: {reason}")


def _sizes(layer: dict[str, Any]) -> str:
    text = f"{layer['input_size']} -> {layer['hidden_size']}"
    if layer["num_layers"] > 1:
        text += f", {layer['num_layers']} layers"
    if layer["bidirectional"]:
        text += ", bidirectional"
    if layer["proj_size"]:
        text += f", projected to {layer['proj_size']}"
    return text if layer["bias"] else f"{text}, no bias"
