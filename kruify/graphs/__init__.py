"""Whole ONNX graphs: their recurrent nodes, and the same graph with small weights."""

from kruify.graphs.writing import Written, write_small

__all__ = ["Written", "write_small"]
