"""The form of each recurrent node of a small graph: folded into dense weights at load, or a Scan, whichever is faster.

Both are run in onnxruntime; what they compute is compared, too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.onnx_file import read_onnx
from kruify.errors import UsageError
from kruify.factors import Structure
from kruify.graphs.comparison import compare_graphs
from kruify.graphs.contents import names_in_file, weight_names
from kruify.graphs.scan_nodes import refusal
from kruify.graphs.writing import Written, write_small

FORMS = ("folded", "scan", "auto")
GAIN = 1.05
"""`auto` writes a Scan where the graph without it takes at least so many times as long."""
TOLERANCE = 1e-3
"""||scan - folded|| / ||folded|| of an output up to which a Scan may change it by rounding."""


@dataclass(frozen=True)
class NodeForm:
    """What a recurrent node with factors became.

    Attributes:
        name: of its layer.
        form: "folded" or "scan".
        reason: why it stays folded, or was not timed; "" where the times say it.
        ms: a call of the graph with this node folded and as a Scan, in milliseconds; None where it was not timed.
    """

    name: str
    form: str
    reason: str = ""
    ms: tuple[float, float] | None = None

    def __str__(self) -> str:
        what = "a Scan" if self.form == "scan" else "folded into dense weights at load"
        if self.ms is None:
            return f"{self.name} is {what}: {self.reason}"
        folded, scan = self.ms
        slow = " (slower: --form auto would fold it)" if self.form == "scan" and scan > folded else ""
        return f"{self.name} is {what}: the graph takes {folded:.3g} ms with it folded, {scan:.3g} ms as a Scan{slow}"


class SmallGraph(NamedTuple):
    """What `write_small` writes: its arguments."""

    original: Path
    tensors: Mapping[str, Tensor | LazyTensor]
    structures: Mapping[str, Sequence[Structure]]
    storage: Mapping[str, str]
    graph: bool = True

    def write(self, output: Path, scan: Sequence[str] = ()) -> Written:
        return write_small(
            self.original, self.tensors, self.structures, self.storage, output, graph=self.graph, scan=scan
        )


def write_in_form(
    small: SmallGraph, output: str | os.PathLike[str], form: str = "folded", feed: Mapping[str, Any] | None = None
) -> tuple[Written, list[NodeForm]]:
    """Writes a small graph with its nodes in the form wanted.

    Args:
        form: "folded"; "scan" for a Scan in the place of every node that can be one; "auto" for one in the place of
            those that make the graph faster here, on one core.
        feed: inputs to run it on; None makes random ones of the declared shapes.

    Returns:
        what was written, and of every node with factors its form; none with "folded".

    Raises:
        UsageError: an unknown form.
    """
    check_form(form)
    if form == "folded":
        return small.write(Path(output)), []
    found = read_onnx(small.original, small.graph)
    structures = names_in_file(found)(small.structures)
    names = {layer: [*weight_names(found, layer, "W"), *weight_names(found, layer, "R")] for layer in found.weights}
    forms, scan = [], list[str]()
    with tempfile.TemporaryDirectory(prefix="kruify-") as folder:
        best, other = Path(folder, "best.onnx"), Path(folder, "other.onnx")
        small.write(best)
        for layer in [layer for layer in names if any(name in structures for name in names[layer])]:
            if (reason := refusal(found, layer, structures)) is not None:
                forms.append(NodeForm(layer, "folded", reason))
                continue
            small.write(other, [*scan, layer])
            compared = compare_graphs(best, other, feed=feed)
            if compared.difference is not None and compared.difference > TOLERANCE:
                changed = f"as a Scan the outputs of the graph change by {compared.difference:.2g} of their norm"
                forms.append(NodeForm(layer, "folded", changed))
                continue
            ms = None if compared.timing is None else compared.timing.run_ms
            taken = form == "scan" or (ms is not None and ms[0] > GAIN * ms[1])
            reason = f"not run in both forms: {compared.reason}" if ms is None else ""
            forms.append(NodeForm(layer, "scan" if taken else "folded", reason, ms))
            if taken:
                scan, best, other = [*scan, layer], other, best
        written = small.write(Path(output), scan)
    return written, forms


def check_form(form: str) -> None:
    """Raises `UsageError` for what is no form."""
    if form not in FORMS:
        raise UsageError(f"the form of a graph is {', '.join(FORMS)}, not '{form}'")
