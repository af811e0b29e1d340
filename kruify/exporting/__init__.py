"""Models that run elsewhere: dense state dicts, ONNX, torch.export, C. Every file is run and compared after writing."""

from kruify.exporting.c_file import export_c
from kruify.exporting.check import TOLERANCE, Exported
from kruify.exporting.layer_files import export_onnx, export_torch
from kruify.exporting.model_files import export_dense, export_graph, export_layers, export_network

__all__ = [
    "TOLERANCE",
    "Exported",
    "export_c",
    "export_dense",
    "export_graph",
    "export_layers",
    "export_network",
    "export_onnx",
    "export_torch",
]
