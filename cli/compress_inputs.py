"""`kruify compress MODEL --inputs SAMPLES`: graphs and programs that become small from samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .console import Output, output, progress
from .options import given

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kruify.search.graph_compression import GraphAttempt, GraphCompression
    from kruify.search.planned import Planned

OF_PROGRAMS = ("budget", "dry_run", "dtype", "lr", "output", "resume", "seed", "steps")
"""Options that go with --run."""
OF_GRAPHS = (*OF_PROGRAMS, "attempts", "card", "form", "max_drop")
"""Options that go with --inputs."""


def compress_inputs(
    models: tuple[str, ...], inputs: str, task: str | None, run: bool, json_only: bool, options: dict[str, Any]
) -> None:
    """Carries it out.

    Args:
        options: of the command, as they were parsed.
    """
    with output(json_only) as out:
        from kruify.checkpoint import check_target
        from kruify.errors import TargetMissedError, UsageError
        from kruify.reporting import to_graph_card
        from kruify.search.graph_compression import compress_graph
        from kruify.search.program_compression import compress_program
        from kruify.tasks.loader import load_function

        context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
        flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        chosen = given(**{n: value for n, value in options.items() if context.get_parameter_source(n) is not default})
        if others := [name for name in chosen if name not in (OF_PROGRAMS if run else OF_GRAPHS)]:
            what = f"{flags[others[0]]} does not go with {'--run' if run else '--inputs'}"
            raise UsageError(what, "compress", "Leave it out")
        if run and (task is not None or len(models) > 1):
            raise UsageError("--run takes one MODEL and no --task", "compress", "Leave the others out")
        if (card := chosen.pop("card", None)) is not None:
            check_target(card, *models, options["output"])
        if task is not None:
            chosen["metric"] = load_function(task)
        chosen["on_layer"] = lambda layer: out.note(
            f"layer {layer.name}: relative error {layer.error_before:.4f} -> {layer.error_after:.4f}"
        )
        if not options["dry_run"]:
            chosen["on_plan"] = lambda planned: out.note(*_plan(models, planned))
        chosen["on_time"] = lambda seconds: out.note(_time(seconds))
        with progress(f"reading {models[0]}") as advance:
            if run:
                done = compress_program(models[0], inputs, progress=advance, **chosen)
            else:
                chosen["on_attempt"] = lambda attempt: out.note(_line(attempt))
                done = compress_graph(models, inputs, progress=advance, **chosen)
        if options["dry_run"]:
            out.show(*_plan(models, done.planned), *([] if done.seconds is None else [_time(done.seconds)]))
            out.show("Dry run: these factors were found and fitted, nothing was written.")
            out.result(done.to_json())
            return
        _show(out, done)
        if card is not None:
            write_card(out, card, to_graph_card(done, models))
        out.result(done.to_json())
        if not done.within:
            drop = done.attempts[done.best].drop
            raise TargetMissedError(
                f"{nearest_of(done.attempts)} loses {drop:.4f}, more than {options['max_drop']}",
                options["output"],
                "Allow more steps, more attempts, a larger file or a larger drop",
            )


def nearest_of(attempts: Sequence[object]) -> str:
    """What the attempt that missed a bound by the least is called."""
    return "the only attempt" if len(attempts) == 1 else f"the nearest of {len(attempts)} attempts"


def write_card(out: Output, path: str, card: str) -> None:
    """Writes a model card."""
    from kruify.checkpoint import atomic_file

    with atomic_file(path) as file:
        file.write(card.encode())
    out.show(f"wrote {path}")


def _plan(models: tuple[str, ...], planned: Planned) -> list[RenderableType]:
    """As `kruify convert` shows it."""
    from kruify.reporting.converted import converted

    return [*converted(", ".join(models), planned.conversion), *_not_trained(planned)]


def _not_trained(planned: Planned) -> list[str]:
    alone = [f"{name} is fitted to its weights alone, not trained: {why}" for name, why in planned.untrained.items()]
    return [*(f"{name} stays dense: {reason}" for name, reason in planned.skipped.items()), *alone]


def _time(seconds: float) -> str:
    from .bar import clock

    return f"the training takes about {clock(seconds)}, measured on the first steps of its first layer"


def _line(attempt: GraphAttempt) -> str:
    lost = "outputs differ by" if attempt.metric is None else "metric worse by"
    return f"{attempt.bytes:,} bytes: {lost} {attempt.drop:.4f}"


def _show(out: Output, done: GraphCompression) -> None:
    from kruify.reporting.terminal import table as titled

    best = done.attempts[done.best]
    layers = titled("error of each layer's outputs, held-out samples", "layer", "converted", "trained", words=0)
    for layer in best.layers:
        layers.add_row(layer.name, f"{layer.error_before:.4f}", f"{layer.error_after:.4f}")
    outputs = titled("outputs of the graph, held-out samples", "output", "error", "SNR", "same arg max", words=0)
    for name, found in best.outputs.items():
        same = "" if found.agreement is None else f"{100 * found.agreement:.2f} %"
        outputs.add_row(name, f"{found.relative_error:.4f}", f"{found.snr_db:.1f} dB", same)
    out.show(layers, outputs)
    if best.together.steps:
        errors = f"relative error {best.together.error_before:.4f} -> {best.together.error_after:.4f}"
        out.show(f"all layers trained together on the outputs: {errors}")
    elif best.layers:
        out.show(f"layers were not trained together: {best.together.reason}")
    out.show(*_not_trained(done.planned))
    if best.metric is not None:
        out.show(f"metric {best.metric:.4f}, of the original {done.baseline:.4f}")
    ratio = done.before / best.bytes
    out.show(f"wrote {done.output}: {done.before:,} bytes -> {best.bytes:,}, {ratio:.1f}x smaller")
    out.show(*map(str, done.forms))
    if done.timing is not None:
        out.show(f"on the first sample it {done.timing}")
