"""A console that prints what it is given."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.text import Text

from kruify.errors import printable


class PlainConsole(Console):
    """rich without its markup, highlighting and emoji: `[v1]` in a file name is part of the name.

    Control characters are written out, also in the cells of tables: names come out of files that nobody vouches for.
    """

    def __init__(self, file: IO[str], width: int | None = None) -> None:
        super().__init__(file=file, width=width, markup=False, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
