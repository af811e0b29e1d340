"""The custom operators `torch.ops.kruify.*` and what is known about the library behind them."""

from kruify.ops import operators as operators  # registers them
from kruify.ops.layout import Layout, TermLayout
from kruify.ops.library import backend_info, has_kernel

__all__ = ["Layout", "TermLayout", "backend_info", "has_kernel"]
