"""Copy a large checkpoint with one tensor changed, and say how much memory that took.

`python tests/checkpoint/fuzz/large.py [--megabytes 2048] [--tensors 16] [--kind torch|safetensors|module|npz]`
prints one JSON object; the file is made on the spot, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20


def make(path: Path, megabytes: int, tensors: int, kind: str) -> None:
    import numpy as np
    import safetensors.torch
    import torch

    numbers = megabytes * MIB // 4 // tensors
    state = {f"block{i}.weight": torch.full((numbers // 1024, 1024), float(i)) for i in range(tensors)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    elif kind == "module":
        module = torch.nn.Module()
        for i, tensor in enumerate(state.values()):
            module.register_module(f"block{i}", torch.nn.Module())
            getattr(module, f"block{i}").register_buffer("weight", tensor)
        torch.save(module, path)
    else:
        torch.save({"epoch": 1, "state_dict": state}, path)


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def convert(path: Path, target: Path) -> dict[str, float]:
    import torch

    from kruify.checkpoint import metadata_for, read, write_safetensors

    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, written = memory("VmRSS"), time.monotonic(), [0]

    def progress(done: float, total: float, phase: str) -> None:
        written[0] = done

    checkpoint = read(path)
    tensors = {**checkpoint.tensors.lazy, "block0.weight": torch.zeros(4, 4)}
    write_safetensors(target, tensors, metadata_for("{}", source_sha256=checkpoint.sha256), progress=progress)
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.lazy.values())
    return {
        "file_mib": path.stat().st_size / MIB,
        "largest_mib": largest / MIB,
        "peak_mib": (memory("VmHWM") - before) / MIB,
        "written_mib": written[0] / MIB,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--kind", default="torch")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(convert(Path(options.step[0]), Path(options.step[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large"
        make(path, options.megabytes, options.tensors, options.kind)
        # A process of its own, in which nothing but the conversion has taken memory.
        command = [sys.executable, "-W", "ignore", __file__, "--step", str(path), f"{path}.kru.safetensors"]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps({"kind": options.kind, **{k: round(v, 1) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
