"""ONNX models in onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXTERNAL = "session.model_external_initializers_file_folder_path"


def cpu_session(model: Path | bytes, threads: int = 1, folder: Path | None = None) -> Any:
    """A session that says nothing but by its errors.

    Args:
        folder: of the external data of a model that is given as bytes.

    Raises:
        ImportError: onnxruntime is not installed. Besides, whatever it raises for a model that it cannot load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if folder is not None:
        options.add_session_config_entry(EXTERNAL, str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
