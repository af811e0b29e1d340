"""What a notebook shows: results as HTML tables, and how far a call is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from kruify.progress import Progress

SECONDS = 0.1  # between two updates


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *sentences: str) -> str:
    """A table without styles of its own, which a notebook gives it, and sentences below it; all of it plain text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    below = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def live_progress() -> Progress:
    """A bar below the cell of a notebook, for the argument `progress`; outside of IPython it shows nothing.

    kruify.convert(model, budget="8x", progress=kruify.live_progress())
    """
    shell = sys.modules.get("IPython")
    if shell is None or shell.get_ipython() is None:
        return lambda done, total, phase: None
    from IPython.display import HTML, display

    begun, last = time.monotonic(), 0.0
    handle: Any = None

    def show(done: float, total: float, phase: str) -> None:
        nonlocal handle, last
        now = time.monotonic()
        if done < total and now - last < SECONDS:
            return
        last = now
        value = f' value="{done}" max="{total}"' if total else ""
        bar = HTML(f"<progress{value}></progress> {escape(phase)}, {now - begun:.0f} s")
        if handle is None:
            handle = display(bar, display_id=True)
        else:
            handle.update(bar)

    return show
