"""penn-treebank: guess the next character of the Wall Street Journal (Marcus et al. 1993; Mikolov et al. 2012).

The corpus is in no package: `penn-treebank:data=FOLDER` takes the folder with ptb.char.train.txt and so on, where
characters stand apart and "_" is a space, or with ptb.train.txt and so on, where words stand apart. Both are read as
the same 50 symbols. Line ends are not counted: 5,017 K / 393 K / 442 K characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kruify.errors import TaskError
from kruify.tasks.king_james import Corpus, KingJames, in_symbols, read


@dataclass(eq=False)
class PennTreebank(KingJames):
    """Character language model in the usual split. Options as for king-james; `data` must be given."""

    measures = "How well the next character of the Penn Treebank is foreseen: bits per character."
    chance = "5.64 bits per character by guessing among 50 symbols"

    def __post_init__(self) -> None:
        if not self.data:
            hint = "Name the folder with ptb.char.train.txt, penn-treebank:data=FOLDER; king-james has a package"
            raise TaskError("the Penn Treebank is in no package", where="penn-treebank", hint=hint)

    def _corpus(self) -> Corpus:
        return corpus(str(self.data))


@cache
def corpus(data: str) -> Corpus:
    """Return the symbols in order, and split -> text as int64 positions in them."""
    texts = read(Path(data).expanduser())
    apart = all(len(token) == 1 for text in texts.values() for token in text.split())
    return in_symbols({split: characters(text, apart) for split, text in texts.items()})


def characters(text: str, apart: bool) -> str:
    """Return the characters of a text, "_" between words, lines joined without anything between.

    Args:
        apart: what stands apart in it are characters, not words.
    """
    return "".join(("" if apart else "_").join(line.split()) for line in text.splitlines())
