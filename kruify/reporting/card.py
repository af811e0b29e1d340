"""A model card: what a report, or a network alone, says of itself, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kruify.checkpoint.summed_biases import in_full
from kruify.conversion.plan import Plan
from kruify.conversion.result import gates_of
from kruify.quantization import DTYPES
from kruify.reporting.markdown import body, table
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.rows import metric

if TYPE_CHECKING:
    from kruify.search.graph_compression import GraphCompression

USE = """## Use

```python
import kruify

model = kruify.{function}({file}, into=dense)  # `dense`: your network, in which layers are replaced
layers = kruify.{function}({file})  # without its code: the recurrent layers by name
```
"""


def to_card(report: Report) -> str:
    """The card of the last model of a report that is no rival.

    The front matter names library, tags and results (`model-index`); licence and data are for its owner to add.
    """
    first, model = report.models[0], [m for m in report.models if not m.is_rival][-1]
    written = f"Made from `{first.name}` by kruify: sums of Kronecker products in place of dense matrices."
    use = USE.format(function="load", file=json.dumps(Path(model.file).name))
    return f"{_front_matter(_results(report, model))}\n# {model.name}\n\n{written}\n\n{body(report)}\n{use}"


def to_plain_card(name: str, plan: Plan, storage: Mapping[str, str], size: int, metrics: Mapping[str, float]) -> str:
    """The card of a network without a report.

    Args:
        name: of its folder or repository.
        storage: weights that are stored in fewer bits -> dtype.
        size: of its file, in bytes.
        metrics: what it achieves.
    """
    smallest_first = sorted({*in_full(storage).values()}, key=list(DTYPES).index, reverse=True)  # biases are wider
    dtypes = ", ".join(smallest_first) or "the dtype of the dense network"
    parts = [
        f"Made by kruify: sums of Kronecker products in place of dense matrices. {size:,} bytes, weights in {dtypes}."
    ]
    if metrics:
        parts.append("\n".join(table(["metric", "value"], [[key, metric(value)] for key, value in metrics.items()])))
    gates = [gate for layer, weight, structures in plan.matrices() for gate in gates_of(layer, weight, structures)]
    columns = ["matrix", "gate", "factors", "parameters before", "after"]
    rows = [
        [f"`{g.name}`", g.gate, f"`{g.factors}`", f"{g.parameters_before:,}", f"{g.parameters_after:,}"] for g in gates
    ]
    parts += ["\n".join(table(columns, rows))] if rows else []
    use = USE.format(function="from_pretrained", file=json.dumps(name))
    return "\n\n".join([f"{_front_matter({})}\n# {name}", *parts, use])


def to_graph_card(done: GraphCompression, models: Sequence[str]) -> str:
    """The card of what `compress_graph` wrote.

    Args:
        models: the graphs that it was made from.
    """
    best, names = done.attempts[done.best], ", ".join(f"`{Path(model).name}`" for model in models)
    parts = [
        f"Made from {names} by kruify: sums of Kronecker products in place of dense recurrent matrices, constants in "
        f"fewer bits. {done.before:,} -> {best.bytes:,} bytes, {done.before / best.bytes:.1f}x smaller."
    ]
    if best.metric is not None and done.baseline is not None:
        parts.append(f"Metric: {metric(best.metric)}, of the original {metric(done.baseline)}.")
    outputs = [
        [f"`{name}`", f"{found.relative_error:.4f}", f"{found.snr_db:.1f} dB"] for name, found in best.outputs.items()
    ]
    layers = [[f"`{one.name}`", f"{one.error_before:.4f}", f"{one.error_after:.4f}"] for one in best.layers]
    for what, columns, rows in (
        ("The outputs beside the original's", ["output", "relative error", "SNR"], outputs),
        ("The outputs of each recurrent layer beside the original's", ["layer", "converted", "trained"], layers),
    ):
        if rows:
            parts.append("\n".join([f"{what}, on samples that were held out:", "", *table(columns, rows)]))
    parts.append("## Use\n\nONNX Runtime and whatever else reads ONNX runs it like the original.\n")
    return "\n\n".join([f"{_front_matter({})}\n# {done.output.stem}", *parts])


def _front_matter(entries: Mapping[str, Any]) -> str:
    """One line a key; JSON is YAML, too."""
    tags = ["kruify", "model-compression", "kronecker"]
    front = {"library_name": "kruify", "tags": tags, **entries}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""])


def _results(report: Report, model: ModelReport) -> dict[str, Any]:
    metrics = [
        {"type": name, "name": f"{name}, {report.split} split", "value": value}
        for name, value in model.metrics.items()
        if math.isfinite(value)
    ]
    if not metrics:
        return {}
    data = {"type": "other", "name": report.task}
    return {"model-index": [{"name": model.name, "results": [{"task": data, "dataset": data, "metrics": metrics}]}]}
