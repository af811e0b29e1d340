"""`kruify inspect MODEL`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .console import Output, json_option, output
from .options import key_option

if TYPE_CHECKING:
    from kruify.api import Inspection
    from kruify.checkpoint import Checkpoint


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
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
        from kruify.api import inspect_checkpoint
        from kruify.checkpoint import read

        checkpoint = read(model, key=key)
        inspection = inspect_checkpoint(checkpoint)
        for sentence in checkpoint.dropped:
            out.note(f"note: {sentence}")
        _show(out, model, inspection)
        found = _file(checkpoint)
        _show_file(out, found)
        out.result(
            {
                **about,
                "layers": _layers(inspection),
                "skipped": [{"name": name, "reason": reason} for name, reason in inspection.skipped],
                "parameters": inspection.parameters,
                "format": inspection.format,
                "sha256": checkpoint.sha256,
                **found,
            }
        )


def _file(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file is beside its layers: wrapper, ties, code that its pickle names, numbers that are none."""
    return {
        "bytes": checkpoint.size,
        "key": checkpoint.key,
        "prefix": checkpoint.prefix,
        "ties": dict(checkpoint.ties),
        "computed": list(checkpoint.computed),
        "globals": sorted(checkpoint.globals),
        "nonfinite": checkpoint.nonfinite(),
    }


def _show_file(out: Output, found: dict[str, Any]) -> None:
    out.show(f"{found['bytes']:,} bytes")
    if found["key"]:
        out.show(f"the state dict stands under {found['key']}")
    if found["prefix"]:
        out.show(f"names begin with {found['prefix']}, which is put back in what is written")
    for second, first in found["ties"].items():
        out.show(f"{second} is tied to {first}")
    for name in found["computed"]:
        out.show(f"{name} is computed from its parametrisation")
    if foreign := [name for name in found["globals"] if not name.startswith(("torch.", "collections.", "builtins."))]:
        out.show(f"names code that was not run: {', '.join(foreign[:10])}")
    for name, count in found["nonfinite"].items():
        out.show(f"{name} has {count:,} {'entry that is' if count == 1 else 'entries that are'} NaN or infinite")


def _layers(inspection: Inspection) -> list[dict[str, Any]]:
    """The layers with their parameters, and for converted ones the factors."""
    from kruify.conversion.plan import by_gate

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
            counts[weight[:9]] += layer.reals * size
        factors = {
            weight: {gate: str(s) for gate, s in by_gate(layer, structures).items()}
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
