"""A model card: the report as Markdown, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kruify.reporting.markdown import body
from kruify.reporting.report import ModelReport, Report

USE = """## Use

```python
import kruify

model = kruify.load({file}, into=dense)  # `dense`: your network, whose recurrent layers are replaced
layers = kruify.load({file})  # without its code: the recurrent layers by name
```
"""


def to_card(report: Report) -> str:
    """The card of the last model of a report that is no rival.

    The front matter names library, tags and results (`model-index`); licence and data are for its owner to add.
    """
    first, model = report.models[0], [m for m in report.models if not m.is_rival][-1]
    written = f"Made from `{first.name}` by kruify: sums of Kronecker products in place of dense matrices."
    use = USE.format(file=json.dumps(Path(model.file).name))
    # One line a key; JSON is YAML, too.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in _front(report, model).items())
    return f"---\n{front}\n---\n\n# {model.name}\n\n{written}\n\n{body(report)}\n{use}"


def _front(report: Report, model: ModelReport) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "kruify", "tags": ["kruify", "model-compression", "kronecker"]}
    metrics = [
        {"type": name, "name": f"{name}, {report.split} split", "value": value}
        for name, value in model.metrics.items()
        if math.isfinite(value)
    ]
    if metrics:
        data = {"type": "other", "name": report.task}
        front["model-index"] = [{"name": model.name, "results": [{"task": data, "dataset": data, "metrics": metrics}]}]
    return front
