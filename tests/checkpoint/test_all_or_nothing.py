"""Writing under the worst: killed at every step, a full disk, folders that cannot be written, links."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kruify.checkpoint import (
    check_target,
    metadata_for,
    origin,
    read,
    write_original,
    write_safetensors,
    write_torch,
    writing,
)
from kruify.errors import UsageError

OLD = {"w": torch.zeros(50), "v": torch.zeros(3)}
NEW = {"w": torch.ones(50), "v": torch.ones(3)}


def in_child(work: Callable[[], None]) -> int:
    """Exit status of `work` in a forked child; negative for a signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except UsageError:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, ended by kill -9 before the given line of writing.py is run, counted in the order of running."""

    def run() -> None:
        left = [step]

        def trace(frame, event, _arg):
            if frame.f_code.co_filename != writing.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()

    return run


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_killed_at_every_step(tmp_path: Path, write) -> None:
    path = tmp_path / "a"
    write(path, NEW, metadata_for("{}"))
    new = path.read_bytes()
    write(path, OLD, metadata_for("{}"))
    old = path.read_bytes()
    seen = []
    for step in range(1, 1000):
        status = in_child(killed_at(step, lambda: write(path, NEW, metadata_for("{}"))))
        assert path.read_bytes() in (old, new)
        seen.append(path.read_bytes() == new)
        path.write_bytes(old)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert len(seen) > 30 and seen[-1] and not seen[0]
    assert seen == sorted(seen)  # old up to the moment of the rename, new from then on


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_the_old_file_and_no_trace(tmp_path: Path, write, room: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        write(path, {"w": torch.ones(100_000)})

    assert in_child(work) == 2
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_each_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, call, fail)
        with pytest.raises(UsageError, match=r"No space left on device.*nothing was changed"):
            write_safetensors(path, NEW)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    tmp_path.chmod(0o555)
    with pytest.raises(UsageError, match="Permission denied"):
        write_safetensors(tmp_path / "a", NEW)
    tmp_path.chmod(0o755)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_takes_no_files() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_safetensors("/proc/a.safetensors", NEW)
    with pytest.raises(UsageError, match="folder /proc cannot be written to"):  # root has the permission
        check_target("/proc/a.safetensors")


def test_links(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real = tmp_path / "store/real"
    write_safetensors(real, OLD)
    (tmp_path / "link").symlink_to("store/real")
    (tmp_path / "second").symlink_to("link")
    write_safetensors(tmp_path / "second", {**read(tmp_path / "link").tensors.lazy, "w": NEW["w"]})
    assert (tmp_path / "second").is_symlink() and (tmp_path / "link").is_symlink()
    assert torch.equal(read(real).tensors["w"], NEW["w"]) and torch.equal(read(real).tensors["v"], OLD["v"])
    (tmp_path / "new").symlink_to("store/not-yet")
    write_safetensors(tmp_path / "new", NEW)
    assert (tmp_path / "store/not-yet").is_file()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError):
        write_safetensors(tmp_path / "loop", NEW)
    assert os.listdir(tmp_path / "store") and not [n for n in os.listdir(tmp_path / "store") if n.endswith(".tmp")]


def test_a_hard_link_to_the_input_keeps_the_input(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "input", OLD)
    os.link(tmp_path / "input", tmp_path / "output")
    write_safetensors(tmp_path / "output", NEW)
    assert torch.equal(read(tmp_path / "input").tensors["w"], OLD["w"])


@pytest.mark.parametrize("kind", ["torch", "module"])
def test_the_original_kind_over_its_own_source(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    layer = torch.nn.GRU(2, 3)
    torch.save(layer if kind == "module" else layer.state_dict(), path)
    checkpoint = read(path)
    tensors = {name: tensor + 1 for name, tensor in checkpoint.tensors.items()}
    write_original(path, tensors, origin(checkpoint), source=path)
    assert all(torch.equal(read(path).tensors[name], tensor) for name, tensor in tensors.items())
    assert json.loads(origin(read(path)))["format"] == checkpoint.format


def test_reading_never_changes_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", OLD)
    (tmp_path / "a").chmod(0o444)
    before = os.stat(tmp_path / "a")
    dict(read(tmp_path / "a").tensors)
    after = os.stat(tmp_path / "a")
    assert (before.st_mtime_ns, before.st_ctime_ns, before.st_ino) == (
        after.st_mtime_ns,
        after.st_ctime_ns,
        after.st_ino,
    )


@pytest.mark.parametrize(("links", "error"), [(True, UsageError), (False, KeyboardInterrupt)])
def test_files_that_go_together_are_all_replaced_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, error: type[BaseException]
) -> None:
    """The third one's place is taken by a folder, which no file can be moved over, or the user interrupts there. The
    first one's place is never empty."""
    new, folder, replace = tmp_path / "new", tmp_path / "folder", os.replace
    for place, names in ((new, "abc"), (folder, "a")):
        place.mkdir()
        for name in names:
            (place / name).write_text(place.name)
    (folder / "c").mkdir()

    def moved(source: Path, target: Path) -> None:
        assert (folder / "a").exists()
        if error is KeyboardInterrupt and target.name == "c":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(os, "replace", moved)
        if not links:
            patch.setattr(os, "link", lambda *_: os.stat(tmp_path / "none"))  # an OSError
        writing.move_files([new / name for name in "abc"], folder)
    assert sorted(file.name for file in folder.iterdir()) == ["a", "c"]
    assert (folder / "a").read_text() == "folder"
    writing.move_files([new / "c"], tmp_path)
    assert (tmp_path / "c").read_text() == "new"
