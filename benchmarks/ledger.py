"""Results that are kept: one JSON file a trained network, in git, and what machine and commit it comes from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]


def read_all(folder: Path) -> list[Entry]:
    """Every entry below `folder`, in the order of the file names."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def write(path: Path, entry: Entry) -> None:
    """Write one entry, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entry, indent=1) + "\n")
    os.replace(temporary, path)


def where_and_when() -> Entry:
    """Machine, threads, torch, commit, date."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=here, check=False).stdout.strip()

    return {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
