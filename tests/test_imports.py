"""A room of the package imports only rooms before it, so that the way of the data has one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kruify.errors

PACKAGE = Path(kruify.errors.__file__).parent
ORDER = [
    "errors", "factors", "kronecker", "ops", "decompose", "layers", "conditioning", "checkpoint", "locate", "plan",
    "planner", "task", "calibrate", "budget", "relabel", "convert", "network", "finetune", "tasks", "evaluate",
    "report", "export", "verify", "record", "trial", "compress", "sweep", "api", "__init__", "cli", "__main__",
]  # fmt: skip


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """Rooms named by import statements anywhere in the file, also within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "kruify"}
    return {room if room in ORDER else "__init__" for room in rooms}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place():
    assert {room_of(file) for file in FILES} <= set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_rooms_before_it(file: Path):
    own = ORDER.index(room_of(file))
    later = {room for room in imported_rooms(file) if ORDER.index(room) > own}
    assert not later, f"{file} imports from {sorted(later)}, which come after {ORDER[own]}"


def test_checker_sees_a_wrong_import(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from kruify.report import Report\n    import kruify\n    from kruify import api\n")
    assert imported_rooms(file) == {"report", "__init__", "api"}
