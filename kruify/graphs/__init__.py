"""Whole ONNX graphs: their recurrent nodes, and the same graph with small weights."""

from kruify.graphs.comparison import Comparison, compare_graphs
from kruify.graphs.forms import NodeForm, SmallGraph, check_form, write_in_form
from kruify.graphs.size import GraphBytes
from kruify.graphs.writing import Written, kept_constants, write_small

__all__ = [
    "Comparison",
    "GraphBytes",
    "NodeForm",
    "SmallGraph",
    "Written",
    "check_form",
    "compare_graphs",
    "kept_constants",
    "write_in_form",
    "write_small",
]
