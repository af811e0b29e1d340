"""Samples that the user names: a folder of .npz files, or a function of a Python file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from kruify.errors import CorruptError, KruifyError, TaskError, UsageError
from kruify.graphs.record import Feed
from kruify.tasks.loader import load_function

Source = str | Path | Callable[[], Iterable[Feed]] | Iterable[Feed]


class Samples:
    """What a graph is fed with, sample by sample, the same each time.

    Args:
        source: a folder of .npz files, each one sample by the names of the inputs; or `file.py:function`, which yields
            such dicts; or such a function itself, or a list.

    Raises:
        UsageError: there is no such folder, or it has no .npz file. TaskError: there is no such function.
    """

    def __init__(self, source: Source) -> None:
        self._files: list[Path] = []
        self._function: Callable[[], Iterable[Feed]] = self._read
        if not isinstance(source, str | Path):
            self._function = source if callable(source) else lambda: source
        elif ".py:" in str(source):
            self._function = load_function(str(source))
        else:
            folder = Path(source)
            self._files = sorted(folder.glob("*.npz")) if folder.is_dir() else []
            if not self._files:
                what = "it has no .npz file" if folder.is_dir() else "there is no such folder"
                hint = "Name a folder of .npz files, arrays by the names of the inputs, or file.py:function"
                raise UsageError(what, folder, hint)

    def __iter__(self) -> Iterator[Feed]:
        number = 0
        try:
            for number, sample in enumerate(self._function()):
                if not isinstance(sample, Mapping):
                    what = f"sample {number} is a {type(sample).__name__}, not a dict of arrays by input"
                    raise TaskError(what, "--inputs")
                yield sample
        except KruifyError:
            raise
        except Exception as error:  # whatever the user's function brings forth
            what = f"the function that gives the samples failed ({type(error).__name__}: {error})"
            raise TaskError(what, f"--inputs, sample {number}", "Correct it and try again") from error

    def _read(self) -> Iterator[Feed]:
        for file in self._files:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    sample = {name: arrays[name] for name in arrays.files}
            except Exception as error:  # numpy has no class of its own for what it cannot read
                raise CorruptError("the sample cannot be read", file, "Write it with numpy.savez") from error
            yield sample
