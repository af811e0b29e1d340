"""Measurements that git keeps: files with one JSON object per line, and where and when each was made."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> list[Row]:
    """The rows of a file in its order; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def store(path: Path, row: Row, *names: str) -> None:
    """Append `row`, or put it in the place of the row with the same values under `names`.

    All or nothing, and under a lock on the folder: several processes may write to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = read(path)
        same = [i for i, old in enumerate(rows) if all(name in old and old[name] == row[name] for name in names)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        os.replace(temporary, path)
    finally:
        os.close(folder)


def where_and_when() -> Row:
    """Machine, threads, torch, commit, date."""
    import torch

    return {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """HEAD, with "-dirty" where the package or the benchmarks differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kruify", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
