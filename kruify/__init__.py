"""kruify: trained RNN, LSTM and GRU checkpoints made small and fast with Kronecker Recurrent Units."""

from kruify.api import Inspection, convert, inspect, load, save
from kruify.convert import densify
from kruify.errors import KruifyError

__all__ = ["Inspection", "KruifyError", "convert", "densify", "inspect", "load", "save"]
