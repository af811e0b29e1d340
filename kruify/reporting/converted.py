"""What a conversion made, or would make, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from kruify.conversion import Conversion
from kruify.conversion.latency import LatencyPlan
from kruify.conversion.result import GateResult
from kruify.factors import stacks
from kruify.reporting.terminal import Fitting, table

LONG = 32
"""Characters; where a matrix has a longer name, layers have numbers in the table, and their names stand below."""
NULL = "null: the energy that an unstructured matrix of this size keeps"
OF_WH = "kept of W h: the energy kept of what the matrix gives on the task's data"


def converted(title: str, conversion: Conversion) -> Sequence[RenderableType]:
    """A table with a row for each gate, then lines with the counts, and what is left of a budget.

    Args:
        title: the model's name.
    """
    gates = conversion.matrices
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(gate.layer for gate in gates), 1)}
    long = any(len(gate.name) > LONG for gate in gates)
    names = [f"{numbers[g.layer]}: {g.name.removeprefix(f'{g.layer}.')}" if long else g.name for g in gates]
    structures = dict.fromkeys((g.shape, g.factors, g.parameters_before, g.parameters_after) for g in gates)
    marks = {structure: f"#{number}" for number, structure in enumerate(structures, 1)}
    marked = [marks[g.shape, g.factors, g.parameters_before, g.parameters_after] for g in gates]
    below = [
        f"{mark}: {'x'.join(map(str, shape))} as {spec}, {before:,} -> {after:,} parameters"
        for (shape, spec, before, after), mark in marks.items()
    ]
    made = Fitting(_table(title, gates, names), [_table(title, gates, names, marked), *below])
    p, size = conversion.parameters, conversion.bytes
    lines = [f"{number}: {layer}" for layer, number in numbers.items()] if long else []
    lines += [
        counts("recurrent matrices", p.recurrent_before, p.recurrent_after, "parameters"),
        counts("whole model", p.total_before, p.total_after, "parameters"),
    ]
    if size is not None:
        if size.file != size.after:
            lines.append(counts("weights in the file", size.before, size.after, "bytes"))
        if size.file is not None:
            lines.append(counts("whole file", size.before, size.file, "bytes"))
            if size.allowed is not None:
                lines.append(f"the budget allows {size.allowed:,} bytes, {size.allowed - size.file:,} are left")
    lines += map(str, conversion.slack)
    if conversion.latency is not None:
        lines.append(_time(conversion.latency))
    if size is not None and size.beside > size.before // 10:
        lines.append(f"{title} holds {size.beside:,} bytes beside its weights, which are not counted")
    lines += [f"note: {sentence}" for sentence in conversion.notes]
    return [*([made] if gates else [title]), *lines]


def _table(title: str, gates: Sequence[GateResult], names: Sequence[str], marked: Sequence[str] = ()) -> Table:
    """A row for each gate; what all have in common takes no column: a terminal may have 80 places.

    Args:
        marked: what stands for the structure of each gate, which is told elsewhere; if empty it is told here.
    """
    specs, shapes = {gate.factors for gate in gates}, {gate.shape for gate in gates}
    if len(shapes) == 1:
        title += f": {'x'.join(map(str, next(iter(shapes))))}"
    if len(specs) == 1:
        title += f": {spec}" if stacks(spec := next(iter(specs))) else f": {spec} in every gate"
    columns = [("matrix", names)]
    if {gate.gate for gate in gates} != {"all"}:
        columns.append(("gate", [gate.gate for gate in gates]))
    if marked:
        columns.append(("factors", marked))
    else:
        if len(shapes) > 1:
            columns.append(("size", ["x".join(map(str, gate.shape)) for gate in gates]))
        if len(specs) > 1:
            columns.append(("factors", [gate.factors for gate in gates]))
    words, caption = len(columns), [NULL]
    if not marked:
        columns.append(("parameters", [f"{g.parameters_before:,} -> {g.parameters_after:,}" for g in gates]))
    columns += [("energy\nkept", _shares(g.energy for g in gates)), ("null", _shares(g.energy_null for g in gates))]
    if any(gate.energy_weighted is not None for gate in gates):
        columns.append(("kept\nof W h", _shares(gate.energy_weighted for gate in gates)))
        caption.append(OF_WH)
    made = table(title, *(head for head, _ in columns), words=words, caption="\n".join(caption))
    for cells in zip(*(cells for _, cells in columns), strict=True):
        made.add_row(*cells)
    return made


def _shares(values: Iterable[float | None]) -> list[str]:
    return ["" if value is None or value != value else f"{value:.3f}" for value in values]


def counts(words: str, before: int, after: int, of: str) -> str:
    """A line such as "whole file  1,000 -> 100 bytes, 10.0x smaller", in columns.

    Args:
        words: what was counted.
        before, after: how many.
        of: their unit.
    """
    return f"{words:19}  {before:>12,} -> {after:>12,} {of}, {before / max(1, after):.1f}x smaller"


def _time(latency: LatencyPlan) -> str:
    data = latency.to_json()
    timed = "1 plan" if len(latency.timed) == 1 else f"{len(latency.timed)} plans"
    how = f"batch {data['batch']}, {data['steps']} steps, {data['threads']} thread; {timed} timed"
    ms = f"{data['dense_ms']:>12.3f} -> {data['ms']:>12.3f} ms"
    return f"{'recurrent layers':19}  {ms}, {data['ratio']:.2f}x less time, {data['wanted']:g}x asked for ({how})"
