"""What a new user does: the README's section "Bring your own model" by copy and paste, every step timed.

    python examples/new_user.py            on a fresh clone in a temporary folder, set-up included: some minutes
    python examples/new_user.py --quick    without clone and set-up, with the kruify that runs this

Blocks of Python that begin with `# NAME.py` are saved under that name; all others are run in order, in an empty folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = "## Bring your own model"
SETUP = "make setup"  # with this begins the block that belongs in the clone


def blocks(readme: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of the section."""
    section = readme[readme.index(SECTION) :].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path, environment: dict[str, str], title: str) -> None:
    """One step; ends everything where it fails."""
    start = clocks()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(f"{since(start)}  {title}", flush=True)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def clocks() -> tuple[float, float]:
    """Seconds: wall clock, and processor time of all children that have ended."""
    times = os.times()
    return time.monotonic(), times.children_user + times.children_system


def since(start: tuple[float, float]) -> str:
    wall, processor = (now - then for now, then in zip(clocks(), start, strict=True))
    return f"{wall:6.1f} s, {processor:6.1f} s of processor time"


def cloned(folder: Path, quick: bool) -> tuple[Path, dict[str, str]]:
    """The clone, set up, and an environment with its programs; with `quick` the tree and the Python that runs this."""
    clone = ROOT if quick else folder / "kruify"
    programs = Path(sys.executable).parent if quick else clone / ".venv" / "bin"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}  # what activate does
    if not quick:
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT, dict(os.environ), "git clone")
        setup = next(text for _, text in blocks((clone / "README.md").read_text(encoding="utf-8")) if SETUP in text)
        run(["bash", "-ec", setup], clone, environment, SETUP)
    return clone, environment


def main(quick: bool) -> None:
    start = clocks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mine"
        folder.mkdir()
        clone, environment = cloned(Path(name), quick)
        for language, text in blocks((clone / "README.md").read_text(encoding="utf-8")):
            if language == "sh" and not text.startswith(SETUP):
                for line in text.splitlines():
                    run(["bash", "-ec", line], folder, environment, line)
            elif language == "python":
                file = re.match(r"# (\w+\.py)\n", text)
                target = folder / (file[1] if file else "block.py")
                target.write_text(text, encoding="utf-8")
                if not file:
                    run(["python", target.name], folder, environment, "a block of Python")
        written = sorted(path.name for path in folder.iterdir() if path.is_file())
    print(f"{since(start)}  in all; written: {', '.join(written)}")


if __name__ == "__main__":
    main("--quick" in sys.argv)
