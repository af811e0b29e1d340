"""A model card: what a report, or a network alone, says of itself, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kruify.conversion.plan import Plan
from kruify.conversion.result import gates_of
from kruify.reporting.markdown import body, table
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.rows import metric

USE = """## Use

```python
import kruify

model = kruify.{function}({file}, into=dense)  # `dense`: your network, whose recurrent layers are replaced
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
    dtypes = ", ".join(sorted({*storage.values()})) or "the dtype of the dense network"
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
