"""A room of the package imports only rooms before it, so that the way of the data has one direction."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ORDER = TEXT.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0].split()


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return "cli" if parts[0] == "cli" else parts[1].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """Rooms named by import statements anywhere in the file, also within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "kruify"}
    return {room if room in ORDER else "__init__" for room in rooms}


def test_a_room_imports_only_rooms_before_it():
    files = [*(ROOT / "kruify").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    assert len(files) > 100
    wrong = []
    for file in files:
        own = ORDER.index(room_of(file))  # a room that CONTRIBUTING.md does not name is an error, too
        wrong += [f"{file} imports {room}" for room in imported_rooms(file) if ORDER.index(room) > own]
    assert not wrong


def test_every_folder_is_a_package():
    """setup.py installs packages; a folder of files without __init__.py would be missing from the wheel."""
    for folder in ("kruify", "cli"):
        assert all((file.parent / "__init__.py").exists() for file in (ROOT / folder).rglob("*.py"))


def test_checker_sees_a_wrong_import(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from kruify.reporting import Report\n    import kruify\n")
    assert imported_rooms(file) == {"reporting", "__init__"}
