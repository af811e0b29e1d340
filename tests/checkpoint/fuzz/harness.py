"""Open files in children of one warm process, under an audit hook, a memory limit and an alarm.

Importing torch takes seconds, so one process imports it, opens one good file of every kind, and then forks for each
file under test. Run as `python harness.py`: reads one JSON list of jobs a line, writes one JSON list of results a line.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEMORY, WORKING = 1 << 30, 3 << 30
"""Bytes of address space that opening a file, and a command that works with it, may add."""

SECONDS = 20
"""Of the processor; a file that waits instead is ended after ten times as long."""

FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.",
    "tempfile.",
    "ctypes.",
    "pickle.find_class",
    "marshal.load",
    "code.__new__",
    "glob.",
    "urllib.",
    "http.",
    "winreg.",
)


def open_all(jobs: list[dict[str, Any]], batch: int = 1) -> list[dict[str, Any]]:
    """Results in the order of the jobs.

    A job is {"path", maybe "expect": a file with the right tensors}, or {"commands": what `kruify` is called with, one
    after the other, until one ends in 1}. A result is {"code": the exit code, "text": the
    sentence, "events": forbidden audit events, "same": whether the tensors equal the expected ones, "seconds",
    "format"}.
    batch: jobs for each child; a child that dies takes its batch with it, which is then repeated one by one.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin and process.stdout
        results = []
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            answers = _ask(process, part)
            if len(part) > 1 and len(answers) != len(part):
                answers = [answer for job in part for answer in _ask(process, [job])]
            results += answers
        process.stdin.close()
    return results


def _ask(process: subprocess.Popen[str], jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(jobs) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _serve() -> None:
    import torch

    from kruify.checkpoint import read
    from kruify.errors import KruifyError

    torch.set_num_threads(1)
    _warm_up(read)
    events: list[str] = []
    watching = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event.startswith(FORBIDDEN) or (event == "open" and args[1] is not None and set(str(args[1])) & set("wax+")):
            events.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(hook)

    def work(job: dict[str, Any]) -> dict[str, Any]:
        nonlocal watching
        events.clear()
        started = time.monotonic()
        result: dict[str, Any] = {"code": 0, "text": "", "same": None}
        signal.alarm(10 * SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        watching = True
        try:
            for arguments in job.get("commands", ()):
                result = _command(arguments)
                if result["code"] == 1:
                    break
            if "commands" in job:
                return {**result, "events": [], "seconds": time.monotonic() - started}
            if job.get("probe"):  # shows that the hook sees what a file must not do
                compile("1", "probe", "eval")
            checkpoint = read(job["path"])
            found = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
            result["format"] = checkpoint.format
        except KruifyError as error:
            result |= {"code": error.exit_code, "text": str(error)}
        except BaseException as error:
            result |= {"code": 1, "text": f"{type(error).__name__}: {error}"}
        else:
            if "expect" in job:
                watching = False
                right = read(job["expect"]).tensors
                result["same"] = set(found) == set(right) and all(
                    found[n].dtype == right[n].dtype and found[n].shape == right[n].shape and _bits(found[n], right[n])
                    for n in right
                )
        watching = False
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {**result, "events": list(events), "seconds": time.monotonic() - started}

    for line in sys.stdin:
        jobs = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            most = size + (WORKING if "commands" in jobs[0] else MEMORY)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps([work(job) for job in jobs]))
                out.flush()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            text = answer.read()
        _, status = os.waitpid(child, 0)
        dead = [{"code": 1, "text": f"died: {os.waitstatus_to_exitcode(status)}", "events": [], "same": None}]
        print(text or json.dumps(dead), flush=True)


def _command(arguments: list[str]) -> dict[str, Any]:
    """One command of the command line; want of memory counts as a bug, whatever its exit code."""
    from click.testing import CliRunner

    from kruify.cli.main import cli

    done = CliRunner().invoke(cli, arguments, prog_name="kruify")
    text = done.stderr.strip()
    short = "not enough memory" in text or "MemoryError" in text
    return {"code": 1 if short else done.exit_code, "text": text}


def _bits(a: Any, b: Any) -> bool:
    import torch

    return bool(torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)))


def _warm_up(read: Any) -> None:
    """Open a good file of every kind, so that what Python itself loads late is loaded before anything is watched."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for path in good_files(Path(folder)):
            checkpoint = read(path)
            for name in checkpoint.tensors:
                checkpoint.tensors[name]
            _ = checkpoint.module_hints
        for bad in (b"", b"\x80\x02.", b"PK\x03\x04", b"hello", b"\x08\x01", b"\x89HDF\r\n\x1a\n"):
            (Path(folder) / "bad").write_bytes(bad)
            try:
                read(Path(folder) / "bad")
            except Exception:
                continue


def good_files(folder: Path) -> list[Path]:
    """One real file of every kind whose library is installed."""
    import numpy as np
    import safetensors.torch
    import torch
    from torch import nn

    from kruify.checkpoint import metadata_for, write_safetensors

    torch.manual_seed(0)
    model = nn.LSTM(3, 5, bidirectional=True)
    state = dict(model.state_dict())
    torch.save({"epoch": 1, "state_dict": state}, folder / "torch.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(model, folder / "module.pt")
    torch.jit.script(model).save(str(folder / "script.pt"))
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    write_safetensors(folder / "kruify.safetensors", state, metadata_for("{}"))
    np.savez(folder / "arrays.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    np.savez_compressed(folder / "packed.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    index = {"weight_map": dict.fromkeys(state, "plain.safetensors")}
    (folder / "model.index.json").write_text(json.dumps(index))
    names = ["torch.pt", "legacy.pt", "module.pt", "script.pt", "plain.safetensors", "kruify.safetensors"]
    names += ["arrays.npz", "packed.npz", "model.index.json"]
    try:
        import onnx
        from onnx import helper

        w, r, b = (torch.randn(2, 20, n).numpy() for n in (3, 5, 1))
        tensors = [("W", w.transpose(0, 2, 1)), ("R", r), ("B", np.concatenate([b[..., 0]] * 2, 1))]
        lstm = helper.make_node("LSTM", ["X", "W2", "R", "B"], ["Z"], hidden_size=5, direction="bidirectional")
        nodes = [helper.make_node("Transpose", ["W"], ["V"], perm=[0, 2, 1])]
        nodes += [helper.make_node("Reshape", ["V", "S"], ["W2"]), lstm]
        z = helper.make_tensor_value_info("Z", 1, [2, 2, 2, 5])
        body = helper.make_graph(nodes, "b", [], [z])
        node = helper.make_node("If", ["C"], ["Y"], then_branch=body, else_branch=body)
        tensors += [("S", np.array([2, 20, 3])), ("C", np.array(True))]
        initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors]
        x = helper.make_tensor_value_info("X", 1, [2, 2, 3])
        y = helper.make_tensor_value_info("Y", 1, [2, 2, 2, 5])
        onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], initializers)), folder / "model.onnx")
        names.append("model.onnx")
    except ImportError:
        pass
    try:
        import h5py

        with h5py.File(folder / "model.weights.h5", "w") as file:
            for part, shape in enumerate(((3, 20), (5, 20), (20,))):
                file.create_dataset(
                    f"layers/lstm/cell/vars/{part}", data=np.random.default_rng(part).random(shape, "f4")
                )
            file["layers/lstm/cell/vars"].attrs["name"] = "lstm_cell"
        names.append("model.weights.h5")
    except ImportError:
        pass
    return [folder / name for name in names]


def jobs_for(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [{"path": str(path)} for path in paths]


if __name__ == "__main__":
    _serve()
