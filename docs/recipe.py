"""Writes docs/recipe.md, the options of fine-tuning, from kruify.training.Recipe: python docs/recipe.py"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from kruify.training import Recipe

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Options of fine-tuning

Written by `python docs/recipe.py` from `kruify.training.Recipe`; do not edit. Each is an argument of `kruify.finetune`
and, on the command line, `--option NAME=VALUE` of `finetune`, `compress`, `sweep` and `train`. `train` begins at
random, with `lr=2e-3`.

| option | default | what it is |
| --- | --- | --- |
"""


def page() -> str:
    """The page as Markdown."""
    attributes = inspect.getdoc(Recipe).partition("Attributes:\n")[2]
    meanings = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, re.MULTILINE | re.DOTALL))
    rows = [f"| `{f.name}` | {f.default} | {' '.join(meanings[f.name].split())} |\n" for f in fields(Recipe)]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
