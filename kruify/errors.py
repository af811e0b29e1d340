"""One tree of errors: what went wrong, where, and what to do next.

Every error a user can cause is a `KruifyError`. Its text is one line, and its class decides the exit code of the
command line: 0 done, 1 a bug, 2 usage, 3 refused as unsafe, 4 corrupt, 5 unsupported, 6 target not met.
"""

from __future__ import annotations

import re

MOST = 1200
"""Characters of a sentence; what a file holds may be quoted in it."""


class KruifyError(Exception):
    """Base of all errors that kruify raises on purpose.

    Args:
        what: what is wrong, a sentence without its full stop.
        where: file, layer or matrix concerned; printed first.
        hint: what to do next, a sentence without its full stop; printed last.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        text = what if where is None else f"{where}: {what}"
        if hint:
            text = f"{text}. {hint}"
        text = printable(" ".join(text.split()))
        super().__init__(text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}")


def printable(text: str) -> str:
    """`text` with control characters written out (\\x1b), so that a name in a file cannot drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its name: for a sentence of ours."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # colours
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:200]


class UsageError(KruifyError):
    """The request cannot be carried out as it was put."""

    exit_code = 2


class FactorSpecError(UsageError):
    """A factor spec cannot be read, or does not fit the matrix."""


class PlanError(UsageError):
    """A plan is malformed, or does not match the layers at hand."""


class TaskError(UsageError):
    """A task cannot be found, loaded or run."""


class UnsafeError(KruifyError):
    """A file would have to run code to be opened, or exceeds a safety limit."""

    exit_code = 3


class CorruptError(KruifyError):
    """A file is damaged or is not what it says it is."""

    exit_code = 4


class UnsupportedError(KruifyError):
    """A file, layer or option that kruify does not handle."""

    exit_code = 5


class TargetMissedError(KruifyError):
    """The result was computed, but it is outside what the user asked for."""

    exit_code = 6
