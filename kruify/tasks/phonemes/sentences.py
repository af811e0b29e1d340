"""English sentences to be spoken: drawn from a small grammar, words and order for their sounds, not their sense."""

from __future__ import annotations

import random

_WORDS = {
    "the": "the a this that every another no their our your my his her",
    "quality": (
        "old young brown purple quiet noisy huge tiny cheap precious warm cold broken smooth foreign usual clever lazy"
        " bright dark thick thin joyful weary curious fresh rough other yellow vague royal fair poor near pure shy"
    ),
    "thing": (
        "boy girl child judge teacher father mother brother neighbour sailor garage house boat ship river mountain"
        " garden kitchen bridge church village window table pencil paper book letter picture measure treasure pleasure"
        " bird fish horse dog cat mouse zebra lizard thunder weather leather toy coin oil water butter bottle apple"
        " orange cherry cheese jam juice soup bread egg leaf tree flower grass sun moon star cloud fire smoke stone"
        " thumb tooth mouth finger shoulder ear eye voice song music word question answer hour year vision genius"
        " beige television machine engine wagon yacht view human thought truth youth wolf shelf glove scarf shoe"
    ),
    "does": (
        "watches finds takes breaks pushes pulls carries follows teaches joins changes measures enjoys loves hates"
        " knows shows throws buys sells cleans washes paints draws cuts cooks eats drinks hears sees feels touches"
        " chooses uses needs wants forgets remembers thanks bathes soothes annoys avoids destroys allows surrounds"
    ),
    "how": (
        "slowly quickly badly gently always never often again today together outside upstairs soon usually yesterday"
    ),
    "where": "under behind beside above below near with without through around before after between against beyond",
    "joined": "and but while because although when",
}
_CLAUSES = (
    "the quality thing does the thing",
    "the thing does the quality thing how",
    "how the thing does the quality thing where the thing",
    "the quality thing where the thing does the thing",
)


def sentences(count: int, seed: int) -> list[str]:
    """Return `count` sentences that follow from `seed`, each of one or two clauses."""
    rng = random.Random(seed)
    return [_sentence(rng) for _ in range(count)]


def _sentence(rng: random.Random) -> str:
    clauses = [_clause(rng) for _ in range(1 + (rng.random() < 0.3))]
    joined = f" {_word(rng, 'joined')} ".join(clauses)
    return f"{joined}.".capitalize()


def _clause(rng: random.Random) -> str:
    return " ".join(_word(rng, kind) for kind in rng.choice(_CLAUSES).split())


def _word(rng: random.Random, kind: str) -> str:
    return rng.choice(_WORDS[kind].split())
