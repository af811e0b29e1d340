"""What somebody sees who installs from source: setup.py under pip, on a copy of the tree."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kruify

ROOT = Path(__file__).parents[1]
# Runs its arguments in a terminal of their own and prints what appears there.
TERMINAL = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The tree without anything built, and an empty PATH beside it."""
    tree = tmp_path / "tree"
    for name in ("kruify", "cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    (tmp_path / "bin").mkdir()
    return tree


def environment(tree: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KRUIFY") and name != "CXX"}
    return {**kept, "PATH": str(tree.parent / "bin"), **more}


def test_without_a_compiler_pip_says_so_and_installs(tree: Path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL, *pip],
        cwd=tree,
        env=environment(tree),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"WITHOUT its compiled kernels.*no C\+\+ compiler.*apt install g\+\+", done.stdout)
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("/METADATA"))))
    assert "kruify/cli/main.py" in names
    assert not [name for name in names if name.endswith(".so")]
    assert about["Version"] == kruify.__version__
    page = about.get_payload()
    assert isinstance(page, str) and page.startswith("# kruify")
    assert re.findall(r"\]\(([^)]*)\)", page)
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", page))


@pytest.mark.parametrize("wish", ["", "1"])
def test_cuda_is_compiled_where_it_is_asked_for_and_announced(tree: Path, wish: str):
    """Compilers that write down their arguments stand in for the real ones, which take minutes."""
    compiler = f'#!{shutil.which("sh")}\necho "$0 $*" >> calls\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n'
    for name in ("c++", "nvcc"):
        program = tree.parent / "bin" / name
        program.write_text(compiler)
        program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=environment(tree, KRUIFY_CUDA=wish, KRUIFY_CUDA_ARCHS="90,120"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # no terminal to write to
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = [call for call in (tree / "calls").read_text().splitlines() if "/nvcc -std" in call]
    assert bool(calls) == bool(wish)
    assert all("arch=compute_90," in call and "arch=compute_120," in call for call in calls)
    assert ("compiling CUDA kernels for 90, 120" in done.stderr) == bool(wish)
    assert re.search(r"compiled (\d+) of \1 files", done.stderr)
