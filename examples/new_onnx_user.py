"""What the owner of an ONNX model does: docs/onnx.md by copy and paste, every step timed.

    python examples/new_onnx_user.py            on a fresh clone in a temporary folder, set-up included: some minutes
    python examples/new_onnx_user.py --quick    without clone and set-up, with the kruify that runs this

Blocks are run in order, in an empty folder. Blocks of Python share their names, so each is run behind those before it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from new_user import clocks, cloned, run, since

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main(quick: bool) -> None:
    start = clocks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mine"
        folder.mkdir()
        clone, environment = cloned(Path(name), quick)
        ready, code = clocks(), ""
        for language, text in BLOCK.findall((clone / "docs" / "onnx.md").read_text(encoding="utf-8")):
            if language == "python":
                code += text
                (folder / "block.py").write_text(code, encoding="utf-8")
                run(["python", "block.py"], folder, environment, "a block of Python")
                continue
            for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
                run(["bash", "-ec", line], folder, environment, line)
        written = sorted(path.name for path in folder.glob("*.onnx"))
    print(f"{since(ready)}  the page; written: {', '.join(written)}")
    print(f"{since(start)}  in all")


if __name__ == "__main__":
    main("--quick" in sys.argv)
