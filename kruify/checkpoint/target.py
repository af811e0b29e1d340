"""Where output may go, asked before the work begins, and the kind of file that the ending of a name asks for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kruify.checkpoint.tensors import LazyTensor, ties
from kruify.checkpoint.writing import as_lazy, write_safetensors, write_torch
from kruify.errors import UsageError
from kruify.progress import Progress

TORCH = (".pt", ".pth", ".ckpt", ".bin", ".th", ".pkl", ".tar", ".model", ".weights")
"""Endings that promise what torch.load opens."""
FOREIGN = (".onnx", ".keras", ".h5", ".hdf5", ".npz", ".pt2", ".ts", ".json", ".py")
"""Endings that promise what no state dict is; any other, or none, stands for safetensors."""


def check_target(path: str | os.PathLike[str], *taken: str | os.PathLike[str]) -> None:
    """Fails before hours of work, not after them.

    Args:
        taken: files that the same command reads, and others that it writes: none of them is overwritten.

    Raises:
        UsageError: `path` is one of `taken`, a folder or a device, or its folder is missing or read-only, or its name
            is longer than the file system takes.
    """
    path = Path(path)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # said below
    except (OSError, ValueError) as error:
        raise UsageError(f"nothing can be written there ({error})", path, "Give another name") from None
    if os.path.realpath(path) in map(os.path.realpath, taken):
        raise UsageError("the same command reads or writes it, too", path, "Name another file to write to")
    if path.exists() and not path.is_file():
        what = "it is a folder" if path.is_dir() else "it is not a regular file"
        raise UsageError(what, path, "Name a file to write to")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {path.parent}", path, "Make it first")
    if (reason := _refused(folder)) is not None:
        what = f"the folder {path.parent} cannot be written to ({reason})"
        raise UsageError(what, path, "Name a file in another one")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """A folder to write into, made where it is missing, before hours of work.

    Raises:
        UsageError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the folder cannot be made ({reason})", folder, "Name another one") from None
    if (refused := _refused(folder)) is not None:
        raise UsageError(f"the folder cannot be written to ({refused})", folder, "Name another one")
    return folder


def _refused(folder: Path) -> str | None:
    """Why no file can be made in a folder. Permissions do not tell: root has them all, in /proc and on a read-only
    disk, too."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_model_target(path: str | os.PathLike[str], *taken: str | os.PathLike[str]) -> None:
    """`check_target` for `write_model`.

    Raises:
        UsageError: also where the ending is that of another kind of file.
    """
    check_target(path, *taken)
    if Path(path).suffix.lower() in FOREIGN:
        raise UsageError(
            f"the ending '{Path(path).suffix}' stands for another kind of file", path, "Write .safetensors or .pt"
        )


def write_model(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Writes the kind of file that the ending asks for: `write_torch` for .pt and its like, else `write_safetensors`.

    Raises:
        UsageError: the file cannot be written, or the ending is that of another kind of file.
    """
    check_model_target(path)
    if Path(path).suffix.lower() in TORCH:
        lazy = as_lazy(tensors)
        write_torch(path, lazy, metadata, links=ties(lazy))
    else:
        write_safetensors(path, tensors, metadata, progress=progress)
