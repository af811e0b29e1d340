"""What a conversion made, or would make, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from kruify.conversion import Conversion
from kruify.conversion.latency import LatencyPlan
from kruify.factors import stacks
from kruify.reporting.terminal import table

LONG = 32
"""Characters; where a matrix has a longer name, layers have numbers in the table, and their names stand below."""
CAPTION = "null: the energy that an unstructured matrix of this size keeps; error: ||W - K|| / ||W||"


def converted(title: str, conversion: Conversion) -> Sequence[RenderableType]:
    """A table with a row for each gate, then lines with the counts, and what is left of a budget.

    Args:
        title: the model's name.
    """
    specs = {gate.factors for gate in conversion.matrices}
    shapes = {gate.shape for gate in conversion.matrices}
    source = title
    if len(shapes) == 1:  # what all have in common takes no column: a terminal may have 80 places
        title += f": {'x'.join(map(str, shapes.pop()))}"
    if len(specs) == 1:
        title += f": {spec}" if stacks(spec := specs.pop()) else f": {spec} in every gate"
    columns = {"energy kept": "energy", "null": "energy_null", "error": "relative_error"}
    if any(gate.energy_weighted is not None for gate in conversion.matrices):
        columns["kept of W h"] = "energy_weighted"
    gates = {gate.gate for gate in conversion.matrices} != {"all"}
    words = ("matrix", *(["gate"] if gates else []), *(["size"] if shapes else []), *(["factors"] if specs else []))
    layers = dict.fromkeys(gate.layer for gate in conversion.matrices)
    numbers = {layer: number for number, layer in enumerate(layers, 1)}
    long = any(len(gate.name) > LONG for gate in conversion.matrices)
    made = table(
        title,
        *words,
        "parameters",
        *(head.replace(" ", "\n", 1) for head in columns),
        words=len(words),
        caption=CAPTION,
    )
    for gate in conversion.matrices:
        values = gate.to_json()
        made.add_row(
            f"{numbers[gate.layer]}: {gate.name.removeprefix(f'{gate.layer}.')}" if long else gate.name,
            *([gate.gate] if gates else []),
            *(["x".join(map(str, gate.shape))] if shapes else []),
            *([gate.factors] if specs else []),
            f"{gate.parameters_before:,} -> {gate.parameters_after:,}",
            *("" if values[key] is None else f"{values[key]:.3f}" for key in columns.values()),
        )
    p, size = conversion.parameters, conversion.bytes
    lines = [f"{number}: {layer}" for layer, number in numbers.items()] if long else []
    lines += [
        _counts("recurrent matrices", p.recurrent_before, p.recurrent_after, "parameters"),
        _counts("whole model", p.total_before, p.total_after, "parameters"),
    ]
    if size is not None:
        if size.file != size.after:
            lines.append(_counts("weights in the file", size.before, size.after, "bytes"))
        if size.file is not None:
            lines.append(_counts("whole file", size.before, size.file, "bytes"))
            if size.allowed is not None:
                lines.append(f"the budget allows {size.allowed:,} bytes, {size.allowed - size.file:,} are left")
    lines += map(str, conversion.slack)
    if conversion.latency is not None:
        lines.append(_time(conversion.latency))
    if size is not None and size.beside > size.before // 10:
        lines.append(f"{source} holds {size.beside:,} bytes beside its weights, which are not counted")
    lines += [f"note: {sentence}" for sentence in conversion.notes]
    return [*([made] if conversion.matrices else [title]), *lines]


def _counts(words: str, before: int, after: int, of: str) -> str:
    return f"{words:19}  {before:>12,} -> {after:>12,} {of}, {before / max(1, after):.1f}x smaller"


def _time(latency: LatencyPlan) -> str:
    data = latency.to_json()
    how = f"batch {data['batch']}, {data['steps']} steps, {data['threads']} thread; {len(latency.timed)} plans timed"
    ms = f"{data['dense_ms']:>12.3f} -> {data['ms']:>12.3f} ms"
    return f"{'recurrent layers':19}  {ms}, {data['ratio']:.2f}x less time, {data['wanted']:g}x asked for ({how})"
