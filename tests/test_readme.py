"""What the README names exists. Its blocks are run by examples/new_user.py, and that by test_examples.py."""

from __future__ import annotations

import re
from pathlib import Path

import click

from kruify.cli.main import cli

README = Path(__file__).parents[1] / "README.md"


def test_every_block_stands_where_it_is_run() -> None:
    """Commands and the output of `make demo` at the top; all other blocks in the section that a new user copies."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Bring your own model") :].split("\n## ")[0]
    outside = re.findall(r"^```(\w+)\n(.*?)^```", text.replace(section, ""), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in outside] == ["sh", "text"]
    assert all(line.startswith(("kruify compress ", "kruify convert ")) for line in outside[0][1].splitlines())


def test_options_named_in_the_text_exist() -> None:
    text = README.read_text(encoding="utf-8")
    known = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    assert isinstance(cli, click.Group)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_files_named_in_the_text_exist() -> None:
    text = re.sub(r"^```.*?^```", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`((?:docs/)?[\w./]+\.md)`", text):
        assert (README.parent / name).is_file(), name
