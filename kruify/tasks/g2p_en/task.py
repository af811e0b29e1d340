"""The task: batches, loss, evaluation and the published weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kruify.tasks._data import package_file, sha1
from kruify.tasks.base import Task, check_split, evaluating
from kruify.tasks.g2p_en.lexicon import INSTALL, PAD, START, STOP, Pronunciation, lexicon, spell
from kruify.tasks.g2p_en.metrics import error_rates
from kruify.tasks.g2p_en.model import G2PNetwork

# The package's names of its weights, and ours. Gates are r, z, n, as in torch.
_PUBLISHED = {
    f"{side}_{kind[0]}_{end}": f"{side}oder.{kind}_{end}_l0"
    for side in ("enc", "dec")
    for kind in ("weight", "bias")
    for end in ("ih", "hh")
} | {"enc_emb": "enc_emb.weight", "dec_emb": "dec_emb.weight", "fc_w": "fc.weight", "fc_b": "fc.bias"}

_POOL = 64  # batches that are sorted by length together: more means less padding, fewer a better mix
_EVALUATION_BATCH = 512


class G2PBatch(NamedTuple):
    """Some words and how they sound."""

    graphemes: Tensor  # (batch, letters) int64, padded
    lengths: Tensor  # (batch,) int64
    inputs: Tensor  # (batch, steps) int64: <s>, then the phonemes
    targets: Tensor  # (batch, steps) int64: the phonemes, then </s>


@dataclass(eq=False)
class G2PEn(Task):
    """English words to phonemes.

    The published network (`published`) has probably seen the test words in its own training, so its figure flatters it.
    The clean comparison is `model`, the same network freshly initialised, trained on the train split of this task.

    Args:
        hidden: size of the embeddings and of both recurrent layers. The published network has 256.
        cell: "gru" as published, or another of kruify.tasks._cells.
        factors: factor spec of a kru cell.
        batch_size: words in a training batch.
        valid_words: words of the valid split that evaluate("valid") looks at: the same ones every time, the first by
            their sha1. The whole split has 5,907.
    """

    hidden: int = 256
    cell: str = "gru"
    factors: str = "auto"
    batch_size: int = 256
    valid_words: int = 1500

    metric = "wer"
    output_kind = "softmax"
    measures = "Share of unseen English words whose pronunciation is not exactly right (wer), and phoneme errors (per)."
    chance = "wer 1.0"

    def model(self) -> G2PNetwork:
        return G2PNetwork(self.hidden, self.cell, self.factors)

    def published(self) -> dict[str, Tensor]:
        """Return the network of g2p-en 2.1.0 (Apache-2.0), float32: 834,890 parameters. TaskError if not installed."""
        file = package_file("g2p_en", "checkpoint20.npz", hint=INSTALL)
        with np.load(file, allow_pickle=False) as arrays:
            return {ours: torch.from_numpy(arrays[theirs].copy()) for theirs, ours in _PUBLISHED.items()}

    def words(self, split: str) -> dict[str, list[Pronunciation]]:
        """Return the words that evaluate(`split`) looks at, with their pronunciations."""
        entries = lexicon()[check_split(split)]
        if split != "valid":
            return entries
        return {word: entries[word] for word in sorted(entries, key=sha1)[: self.valid_words]}

    def examples(self, split: str) -> int:
        return len(self.words(split))

    def batches(self, split: str, *, seed: int = 0) -> Iterator[G2PBatch]:
        """Yield batches of words with the dictionary's first pronunciation; words of a batch have nearly equal lengths.

        "train" has 105,602 words, 413 batches of 256.
        """
        pairs = [(spell(word), pronunciations[0]) for word, pronunciations in self.words(split).items()]
        if split == "train":
            batches = bucketed(pairs, self.batch_size, random.Random(seed))
        else:
            pairs.sort(key=_lengths)
            batches = _chunks(pairs, _EVALUATION_BATCH)
        for batch in batches:
            yield collate(batch)

    def forward(self, model: nn.Module, batch: G2PBatch) -> Tensor:
        """Return logits (batch, steps, 74)."""
        return cast(Tensor, model(batch.graphemes, batch.lengths, batch.inputs))

    def loss(self, outputs: Tensor, batch: G2PBatch) -> Tensor:
        """Return the mean cross entropy of the next phoneme in nats; padding does not count."""
        return functional.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD)

    def weight(self, batch: G2PBatch) -> float:
        """Return the number of phonemes that the loss is over."""
        return float((batch.targets != PAD).sum())

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return {"wer", "per"} of greedy decoding; see metrics.error_rates."""
        entries = self.words(split)
        answers = predict(model, list(entries))
        return error_rates(zip(answers, entries.values(), strict=True))


def predict(model: nn.Module, words: list[str]) -> list[list[int]]:
    """Return the phoneme indices that `model` gives each word, as the package's own predict() does one by one."""
    spelled = [spell(word) for word in words]
    order = sorted(range(len(words)), key=lambda index: len(spelled[index]))
    answers: list[list[int]] = [[] for _ in words]
    with evaluating(model) as device:
        for chunk in _chunks(order, _EVALUATION_BATCH):
            graphemes = _padded([spelled[index] for index in chunk])
            lengths = torch.tensor([len(spelled[index]) for index in chunk])
            chosen = cast(G2PNetwork, model).decode(graphemes.to(device), lengths.to(device)).tolist()
            for index, row in zip(chunk, chosen, strict=True):
                answers[index] = row[: row.index(STOP)] if STOP in row else row
    return answers


T = TypeVar("T")
Pair = tuple[list[int], Pronunciation]


def collate(pairs: list[Pair]) -> G2PBatch:
    return G2PBatch(
        graphemes=_padded([graphemes for graphemes, _ in pairs]),
        lengths=torch.tensor([len(graphemes) for graphemes, _ in pairs]),
        inputs=_padded([[START, *phonemes] for _, phonemes in pairs]),
        targets=_padded([[*phonemes, STOP] for _, phonemes in pairs]),
    )


def bucketed(pairs: list[Pair], size: int, rng: random.Random) -> list[list[Pair]]:
    """Return all pairs in batches of `size`, shuffled, with words of nearly equal lengths together."""
    pairs = rng.sample(pairs, len(pairs))
    batches = [batch for pool in _chunks(pairs, size * _POOL) for batch in _chunks(sorted(pool, key=_lengths), size)]
    rng.shuffle(batches)
    return batches


def _lengths(pair: Pair) -> tuple[int, int]:
    return len(pair[0]), len(pair[1])


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
