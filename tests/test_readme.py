"""The README's blocks, run in order in an empty folder, as a reader would by copy and paste."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kruify.cli.main import cli

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = 0
    for language, text in blocks():
        if language == "python" and text.startswith("# task.py"):
            Path("task.py").write_text(text)
        elif language == "python":
            exec(compile(text, str(README), "exec"), {"__name__": "readme"})
        elif language == "sh":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "kruify":
                    result = CliRunner().invoke(cli, words[1:])
                    assert result.exit_code == 0, (line, result.stderr)
                    commands += 1
    assert commands >= 7
    for name in ("model.kru.safetensors", "small.kru.safetensors", "report.html", "dense.pt"):
        assert Path(name).stat().st_size > 0


def test_options_named_in_the_text_exist() -> None:
    text = README.read_text(encoding="utf-8")
    known = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    assert isinstance(cli, click.Group)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_files_named_in_the_text_exist() -> None:
    text = re.sub(r"^```.*?^```", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`((?:docs/)?[\w./]+\.md)`", text):
        assert (README.parent / name).is_file(), name
