"""Word and phoneme error rates over a dictionary that lists several right answers for some words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the least number of insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(pairs: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> dict[str, float]:
    """Return {"wer", "per"} of (answer, right answers) pairs, each against the right answer that is nearest to it.

    wer: share of words that are not exactly right. per: edits needed, over the length of the right answers.
    """
    words = wrong = edits = phonemes = 0
    for answer, variants in pairs:
        distance, length = min((edit_distance(answer, variant), len(variant)) for variant in variants)
        words, wrong = words + 1, wrong + (distance > 0)
        edits, phonemes = edits + distance, phonemes + length
    return {"wer": wrong / max(words, 1), "per": edits / max(phonemes, 1)}
