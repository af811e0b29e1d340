"""How long `import kruify.api` takes beside `import torch`, and `kruify --help`; writes import_time.md.

    python benchmarks/import_time.py           a minute

Each figure is the least of `--rounds` new processes, which take turns: seconds of processor time, user and system, with
one thread, which other programs lengthen less than the time on the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

from measurements import where_and_when

PAGE = Path(__file__).with_suffix(".md")
COMMANDS = {
    "`import torch`": "import torch",
    "`import kruify.api`, torch with it": "import kruify.api",
    "`kruify --help`": "import sys; sys.argv = ['kruify', '--help']; from kruify.cli.main import main; main()",
}


def seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for code in COMMANDS.values():  # compiles what was not imported before
        seconds(code)
    for _ in range(rounds):
        for name, code in COMMANDS.items():
            times[name].append(seconds(code))
    least = {name: min(found) for name, found in times.items()}
    first, second, _ = least.values()
    where = where_and_when()
    lines = [
        "# Time to start",
        "",
        f"Written by `python benchmarks/import_time.py`: {where['machine']}, torch {where['torch']}, commit "
        f"{where['commit']}, {where['date']}; least of {rounds} processes each, seconds of processor time.",
        "",
        "| | seconds |",
        "|--|--|",
        *(f"| {name} | {value:.2f} |" for name, value in least.items()),
        f"| kruify above torch | {second - first:.2f} |",
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
