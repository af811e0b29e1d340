"""Marks for torch.compile that do not import it: torch._dynamo and sympy take longer to import than torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """`torch.compiler.assume_constant_result`: torch.compile runs the function instead of looking into it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
