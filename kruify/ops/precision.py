"""The precision of the products inside an operator: that of the tensors, or on a GPU less where torch was told so.

The operators' `precision` says what the products of float32 tensors may be rounded to; sums, states and results stay
float32. The CPU kernels have no use for it. On CUDA it is, as for torch's own products and RNNs:

    float32     the default
    TF32        torch.backends.cuda.matmul.allow_tf32, or torch.set_float32_matmul_precision("high" or "medium")
    bf16        torch.autocast("cuda", torch.bfloat16)

Under autocast to float16 the products are TF32: as many bits as float16, and no overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.ops import tracing

FLOAT32, TF32, BF16 = 0, 1, 2
NAMES = ("float32", "tf32", "bf16")


def of_products(device: torch.device) -> int:
    """What the settings of torch ask for on this device, here and now."""
    if device.type != "cuda":
        return FLOAT32
    if torch.is_autocast_enabled("cuda"):
        return BF16 if torch.get_autocast_dtype("cuda") == torch.bfloat16 else TF32
    return TF32 if _tf32_allowed() else FLOAT32


# torch.compile cannot look into it; it compiles anew when the setting changes.
@tracing.constant
def _tf32_allowed() -> bool:
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def autocast_to(tensor: Tensor) -> Tensor:
    """A result as autocast wants it: float32 becomes its dtype, as from torch.nn.LSTM; all else stays."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
