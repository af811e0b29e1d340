from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kruify.errors import CorruptError, TaskError
from kruify.tasks import king_james
from kruify.tasks.king_james import corpus, split_chapters
from kruify.tasks.loader import load_task
from kruify.tasks.penn_treebank import corpus as penn_treebank

installed = pytest.mark.skipif(shutil.which("bible") is None, reason="Debian package bible-kjv is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, text in (("train", "abracadabra " * 60), ("valid", "cab\n" * 30), ("test", "bad dab " * 25)):
        (tmp_path / f"ptb.char.{split}.txt").write_text(text)
    return tmp_path


def decode(data: str, indices: Tensor) -> str:
    return "".join(corpus(data)[0][index] for index in indices.tolist())


def test_batches_of_a_folder(folder: Path) -> None:
    task = load_task(f"king-james:data={folder},steps=10,batch_size=8,hidden=8")
    assert corpus(str(folder))[0] == "\n abcdr"
    assert [task.examples(split) for split in ("train", "valid", "test")] == [720, 120, 200]
    starts = set()
    for seed in range(4):
        batches = list(task.batches("train", seed=seed))
        assert 70 <= sum(len(batch.x) for batch in batches) <= 71
        for batch in batches:
            assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
            assert all(decode(str(folder), row) in "abracadabra " * 3 for row in batch.x)
        starts.add(decode(str(folder), torch.cat([batch.x for batch in batches])[0]))
    assert len(starts) > 1
    assert torch.equal(next(iter(task.batches("valid", seed=1))).x, next(iter(task.batches("valid", seed=2))).x)


class Repeats(nn.Module):
    """Foresees, with certainty p, what stood eight places before the next character; it needs its state for that."""

    def __init__(self, symbols: int, p: float) -> None:
        super().__init__()
        self.symbols, self.p = symbols, p

    def run(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = state if state is not None else torch.zeros(len(x), 7, dtype=torch.long)
        joined = torch.cat([before, x], 1)
        probabilities = torch.full((*x.shape, self.symbols), (1 - self.p) / (self.symbols - 1))
        probabilities.scatter_(-1, joined[:, : x.shape[1], None], self.p)
        return probabilities.log(), joined[:, -7:]


def test_evaluation_carries_the_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(king_james, "_STREAMS", 1)
    task = load_task(f"king-james:data={folder}")
    p, n = 0.9, 7
    rest = math.log2((n - 1) / (1 - p))
    found = {}
    for chunk in (256, 9, 1):
        monkeypatch.setattr(king_james, "_CHUNK", chunk)
        found[chunk] = task.evaluate(Repeats(n, p), "test")["bits_per_character"]
    # 199 characters are foreseen; the first seven of them from nothing, and "bad dab" has none of what is guessed there
    assert found[256] == pytest.approx((192 * -math.log2(p) + 7 * rest) / 199, rel=1e-5)
    assert found[9] == pytest.approx(found[256], rel=1e-5)
    assert found[1] == pytest.approx(found[256], rel=1e-5)


def test_evaluation_of_a_network_that_knows_nothing(folder: Path) -> None:
    task = load_task(f"king-james:data={folder},hidden=4")
    model = task.model()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert task.evaluate(model, "valid")["bits_per_character"] == pytest.approx(math.log2(7), rel=1e-5)


def test_single_file_is_cut_from_front_to_back(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a" * 90 + "b" * 5 + "c" * 5)
    symbols, texts = corpus(str(file))
    assert symbols == "abc"
    assert {split: text.tolist() for split, text in texts.items()} == {
        "train": [0] * 90,
        "valid": [1] * 5,
        "test": [2] * 5,
    }


def test_chapters_go_to_one_split_each() -> None:
    lines = [
        f"{book}{chapter}:{verse} {book} {chapter}."
        for book in ("Ge", "1Chr")
        for chapter in range(50)
        for verse in (1, 2)
    ]
    splits = split_chapters(lines)
    sets = [set(text.splitlines()) for text in splits.values()]
    assert sum(text.count("\n") for text in splits.values()) == len(lines)
    assert all(sets)
    assert sum(len(chapters) for chapters in sets) == 100
    with pytest.raises(CorruptError, match='"nonsense" is no verse'):
        split_chapters(["nonsense"])


@installed
def test_installed_text() -> None:
    symbols, texts = corpus(None)
    assert len(symbols) == 63
    assert {split: len(text) for split, text in texts.items()} == {
        "train": 3_719_730,
        "valid": 252_672,
        "test": 165_448,
    }
    assert "".join(symbols[index] for index in texts["train"][:32].tolist()) == "In the beginning God created the"
    frequency = torch.cat(list(texts.values())).bincount().double() / 4_137_850
    assert float(-(frequency * frequency.log2()).sum()) == pytest.approx(4.36, abs=0.005)


def test_missing_program_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    king_james.corpus.cache_clear()
    with pytest.raises(TaskError, match="apt-get install bible-kjv") as caught:
        load_task("king-james").model()
    assert caught.value.exit_code == 2


def test_unusable_texts(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"0 files match \*train\*\.txt"):
        load_task(f"king-james:data={tmp_path}").model()
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TaskError, match="UTF-8"):
        load_task(f"king-james:data={tmp_path}/t.txt").model()
    (tmp_path / "short.txt").write_text("abc" * 9)
    with pytest.raises(TaskError, match="too short"):
        task = load_task(f"king-james:data={tmp_path}/short.txt,hidden=2")
        task.evaluate(task.model(), "valid")


PTB = {"train": "no it was n't\n<unk> rose N %\n", "valid": "a b\n", "test": "was it\n"}


@pytest.mark.parametrize("form", ["characters", "words"])
def test_penn_treebank_in_either_form(tmp_path: Path, form: str) -> None:
    for split, text in PTB.items():
        lines = [f" {line} " for line in text.splitlines()]
        name = f"ptb.{split}.txt"
        if form == "characters":
            lines, name = [f" {' '.join(line.strip().replace(' ', '_'))} " for line in lines], f"ptb.char.{split}.txt"
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    task = load_task("penn-treebank", data=tmp_path, steps=4, hidden=4)
    symbols, texts = penn_treebank(str(tmp_path))
    spelled = {split: "".join(symbols[i] for i in text.tolist()) for split, text in texts.items()}
    assert spelled == {"train": "no_it_was_n't<unk>_rose_N_%", "valid": "a_b", "test": "was_it"}
    assert task.examples("train") == 27
    batch = next(iter(task.batches("train")))
    assert torch.isfinite(task.loss(task.forward(task.model(), batch), batch))


def test_penn_treebank_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the Penn Treebank is in no package"):
        load_task("penn-treebank")
    with pytest.raises(TaskError, match=r"0 files match \*train\*\.txt"):
        load_task("penn-treebank", data=tmp_path).batches("train").__next__()
    assert f"{math.log2(50):.2f}" in load_task("penn-treebank", data=tmp_path).chance
