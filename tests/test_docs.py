"""Runs every code block of the documentation, page by page, from top to bottom, in an empty folder.

```python              executed; the blocks of a page share their names
```python title="NAME" written to NAME
```console             each line `$ kruify ...` is run; `# exit N` at its end is the exit code expected, else 0
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kruify.analysis.latency import measure_latency
from kruify.cli.main import cli

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    # Latency is measured for seconds; its figures are not looked at here.
    monkeypatch.setattr(
        "kruify.reporting.build.measure_latency", lambda layers, **_: measure_latency(layers, seconds=0.0)
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    before = set(sys.modules)
    try:
        for block in BLOCK.finditer(text):
            language, file, code = block.groups()
            line = text.count("\n", 0, block.start()) + 1
            if file:
                Path(file).write_text(code, encoding="utf-8")
            elif language == "python":
                exec(compile(code, f"{page}:{line}", "exec"), names)
            elif language == "console":
                for command in re.findall(r"^\$ kruify (.*)$", code, re.MULTILINE):
                    run(command, f"{page}:{line}")
            else:
                pytest.fail(f"{page}:{line}: no way to run a block of {language}")
    finally:
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[module]


def run(command: str, where: str) -> None:
    command, _, comment = command.partition("  # ")
    expected = int(comment.removeprefix("exit ")) if comment else 0
    result = CliRunner().invoke(cli, shlex.split(command))
    assert result.exit_code == expected, f"{where}: kruify {command}\n{result.output}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (DOCS / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_python_blocks_parse(page: str) -> None:
    for block in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        if block[1] == "python":
            ast.parse(block[3])


def test_the_command_line_page_names_every_command_and_key() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert re.search(rf"^## {name}\b", text, re.MULTILINE), f"docs/command-line.md says nothing of '{name}'"


def test_the_page_of_the_recipe_is_made_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("recipe", DOCS / "recipe.py")
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert recipe.PAGE.read_text(encoding="utf-8") == recipe.page(), "run: python docs/recipe.py"


def test_the_site_is_built_without_a_warning() -> None:
    """All pages of the tree, every link and anchor of them."""
    pytest.importorskip("mkdocs")
    tree = DOCS.parent
    if not (tree / ".git").exists():
        pytest.skip("the site is made of the files that git knows")
    command = ["make", "docs", "-o", ".venv/.built", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'class="filename">echo.py<' in (tree / "build/site/docs/command-line.html").read_text(encoding="utf-8")
