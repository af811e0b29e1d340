"""king-james: guess the next character of the King James Bible.

The text comes out of the Debian package bible-kjv, by running its program `bible` (public domain). `data=PATH` takes
another text instead: a folder with one *train*.txt, one *valid*.txt and one *test*.txt, or a single text file. The
Penn Treebank has a task of its own, penn-treebank.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from kruify.errors import CorruptError, TaskError
from kruify.tasks._data import split_of
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask, shuffled
from kruify.tasks.base import SPLITS, check_split, evaluating

_VERSE = re.compile(r"(?P<chapter>\w+):\d+ (?P<text>.*)")  # "1Chr2:3 The sons of ..."
Corpus = tuple[str, dict[str, Tensor]]
"""The symbols, and split -> text as positions in them."""
_STREAMS, _CHUNK = 64, 256  # evaluation reads so many parts of the text side by side, so many characters at once


@dataclass(eq=False)
class KingJames(SequenceTask):
    """Character language model: 4,137,850 characters, 63 symbols, one verse per line.

    Splits are whole chapters, by sha1 of the reference ("Ge1") % 100: 5 % test, 5 % valid. A single text file of your
    own is cut 90/5/5 from front to back.

    Args:
        data: a folder with *train*.txt, *valid*.txt, *test*.txt, or one text file.
        steps: characters of a training sequence; each starts from a zero state.
    """

    data: str | None = None
    steps: int = 128
    hidden: int = 256

    metric = "bits_per_character"
    output_kind = "softmax"
    measures = "How well the next character of the King James Bible is foreseen: bits per character."
    chance = "4.36 bits per character by letter frequency alone, 5.98 by nothing"

    def model(self) -> SequenceNetwork:
        symbols = len(self._corpus()[0])
        return SequenceNetwork(symbols, symbols, self, one_hot=True)

    def examples(self, split: str) -> int:
        """Return the number of characters in `split`."""
        return len(self._text(split))

    def _text(self, split: str) -> Tensor:
        return self._corpus()[1][check_split(split)]

    def _corpus(self) -> Corpus:
        return corpus(self.data)

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x, y (batch, steps) int64, y one character ahead. For "train" the cuts shift with the seed."""
        text = self._text(split)
        shift = int(torch.randint(self.steps, (), generator=torch.Generator().manual_seed(seed)))
        starts = torch.arange(shift if split == "train" else 0, len(text) - self.steps, self.steps)
        within = torch.arange(self.steps)
        for index in shuffled(len(starts), self.batch_size, seed if split == "train" else 0):
            at = starts[index, None] + within
            yield Batch(text[at], text[at + 1])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return {"bits_per_character"}: the split in 64 equal parts side by side, state carried from end to end."""
        text = self._text(split)
        if len(text) < 2:
            raise TaskError(f'split "{split}" is too short', where=type(self).__name__, hint="Give more text")
        streams = min(_STREAMS, len(text) // 2)
        rows = text[: len(text) // streams * streams].view(streams, -1)
        nats = count = 0.0
        state = None
        with evaluating(model) as device:
            for start in range(0, rows.shape[1] - 1, _CHUNK):
                x = rows[:, start : min(start + _CHUNK, rows.shape[1] - 1)].to(device)
                y = rows[:, start + 1 : start + 1 + x.shape[1]].to(device)
                outputs, state = cast(SequenceNetwork, model).run(x, state)
                nats += float(self.loss(outputs, Batch(x, y))) * y.numel()
                count += y.numel()
        return {"bits_per_character": nats / count / math.log(2)}


@cache
def corpus(data: str | None) -> Corpus:
    """Return the symbols in order, and split -> text as int64 positions in them."""
    return in_symbols(read(Path(data).expanduser()) if data else split_chapters(_verses()))


def in_symbols(texts: dict[str, str]) -> Corpus:
    """Return the symbols of all texts in order, and split -> text as int64 positions in them."""
    symbols = "".join(sorted(set().union(*texts.values())))
    position = {ord(symbol): index for index, symbol in enumerate(symbols)}
    return symbols, {name: torch.tensor([position[ord(c)] for c in text]) for name, text in texts.items()}


def split_chapters(lines: Iterable[str]) -> dict[str, str]:
    """Return split -> text from lines such as "Ge1:1 In the beginning ...", without the references."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for line in lines:
        match = _VERSE.fullmatch(line)
        if match is None:
            raise CorruptError(f'"{line[:40]}" is no verse', where="bible", hint="Reinstall the package bible-kjv")
        splits[split_of(match["chapter"], 5)].append(match["text"] + "\n")
    return {name: "".join(text) for name, text in splits.items()}


def _verses() -> list[str]:
    program = shutil.which("bible", path="/usr/bin:/usr/local/bin:/usr/games")
    if program is None:
        hint = "Run `apt-get install bible-kjv`, or name a text of your own: king-james:data=PATH"
        raise TaskError("the program `bible` of the Debian package bible-kjv is not installed", hint=hint)
    command = [program, "-f", "Gen1:1-Rev22:21"]  # -f: one verse per line, each with its reference
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise TaskError(f"it does not give its text: {error}", where=program, hint="Reinstall bible-kjv") from error
    return done.stdout.decode("latin-1").splitlines()


def read(path: Path) -> dict[str, str]:
    """Return split -> text of a folder with three files, or of one file cut 90/5/5 from front to back."""
    if path.is_file():
        text = _text_of(path)
        a, b = len(text) * 90 // 100, len(text) * 95 // 100
        return {"train": text[:a], "valid": text[a:b], "test": text[b:]}
    texts = {}
    for split in SPLITS:
        found = sorted(path.glob(f"*{split}*.txt"))
        if len(found) != 1:
            hint = "Name a folder with one *train*.txt, one *valid*.txt and one *test*.txt, or a text file"
            raise TaskError(f"{len(found)} files match *{split}*.txt", where=path, hint=hint)
        texts[split] = _text_of(found[0])
    return texts


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"it cannot be read as UTF-8 text: {error}", where=file) from error
