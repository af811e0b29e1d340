"""What an error of another library says, in a sentence of ours."""

from __future__ import annotations

from kruify.errors import first_line


def test_the_first_line_of_an_error_without_colours() -> None:
    assert first_line(RuntimeError("\n\x1b[96mcannot\x1b[0m trace\nNext steps:")) == "cannot trace"
    assert first_line(KeyError()) == "KeyError"
