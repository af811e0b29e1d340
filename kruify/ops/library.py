"""The compiled library behind the operators: where it is, whether it loaded, and what it can do."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"


@cache
def load() -> str | None:
    """Loads the compiled kernels once; returns None, or the reason why the torch reference has to serve."""
    if os.environ.get("KRUIFY_NO_KERNELS"):
        return "KRUIFY_NO_KERNELS is set"
    if not LIBRARY.exists():
        reason = f"{LIBRARY.name} was not built when kruify was installed"
    else:
        try:
            torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
            for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
                if torch._C._dispatch_has_kernel_for_dispatch_key("kruify::recurrence", key):
                    _devices.add(device)
            return None
        except (OSError, RuntimeError) as error:
            reason = f"{LIBRARY.name} does not load: {error}"
    warnings.warn(
        f"kruify runs WITHOUT its compiled kernels and will be slow ({reason}). With a C++ compiler (`apt install g++`)"
        " and torch in place, install it again with `pip install --force-reinstall --no-deps --no-cache-dir`",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


_devices: set[str] = set()  # kinds of device that the loaded library has kernels for


def has_kernel(device_type: str) -> bool:
    """Whether a compiled kernel serves tensors on this kind of device."""
    return device_type in _devices


def backend_info() -> dict[str, object]:
    """What the operators run on.

    Returns:
        `compiled` (bool), `reason` (why not, or None), `cpu` (instruction set in use, or 'torch reference'), `int8`
        (that of eight-bit products, or None), `cuda` (bool: compiled kernels for CUDA are there), `threads`.
    """
    reason = load()
    isa, eight = "torch reference", None
    if has_kernel("cpu"):
        isa = ("portable", "avx2", "avx512")[int(torch.ops.kruify.instruction_set())]
        names = ("portable", "avx2", "avx-vnni", "avx512-vnni", "arm dot product")
        eight = names[int(torch.ops.kruify.int8_instruction_set())]
    return {
        "compiled": reason is None,
        "reason": reason,
        "cpu": isa,
        "int8": eight,
        "cuda": has_kernel("cuda"),
        "threads": torch.get_num_threads(),
    }
