"""What torch.compile calls as it is. Imported while it traces, because the decorator imports torch._dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lstm(*arguments: Any) -> Any:
    """torch's LSTM."""
    return _VF.lstm(*arguments)
