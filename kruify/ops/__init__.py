"""The custom operators `torch.ops.kruify.*`, one file each, and what is known about the library behind them."""

from kruify.ops import dense as dense  # each registers its operators
from kruify.ops import int8 as int8
from kruify.ops import kron_matmul as kron_matmul
from kruify.ops import library
from kruify.ops import merge as merge
from kruify.ops import recurrence as recurrence
from kruify.ops.layout import Layout, TermLayout
from kruify.ops.library import backend_info, has_kernel

library.load()

__all__ = ["Layout", "TermLayout", "backend_info", "has_kernel"]
