from __future__ import annotations

import importlib.util
import json
import math
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn

from kruify.errors import CorruptError, TaskError, UnsafeError
from kruify.tasks import _data, _scores, jsb
from kruify.tasks._data import split_of
from kruify.tasks._scores import chorales, frames
from kruify.tasks.loader import load_task

installed = pytest.mark.skipif(importlib.util.find_spec("music21") is None, reason="package music21 is not installed")

PIECES = {
    "train": [[[60, 64, 67], [60, 65]], [[21, 108]], [[60], [], [62, -1]]],
    "valid": [[[50]]],
    "test": [[[60, 64], [60, 64]], [[72]]],
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    jsb.rolls.cache_clear()


def as_matrix(piece: list[list[int]]) -> np.ndarray:
    matrix = np.zeros((len(piece), 88), np.uint8)
    for frame, pitches in enumerate(piece):
        for pitch in pitches:
            if pitch > 0:
                matrix[frame, pitch - 21] = 1
    return matrix


def write_mat(file: Path, pieces: dict[str, list[list[list[int]]]]) -> None:
    """Cell arrays (1, pieces), as MATLAB writes them."""
    cells = {}
    for split, found in pieces.items():
        cells[f"{split}data"] = np.empty((1, len(found)), dtype=object)
        for index, piece in enumerate(found):
            cells[f"{split}data"][0, index] = as_matrix(piece)
    savemat(file, cells)


@pytest.mark.parametrize("kind", ["json", "pickle", "mat"])
def test_batches_of_the_classic_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"JSB Chorales.{kind}"
    if kind == "json":
        file.write_text(json.dumps(PIECES))
    elif kind == "mat":
        write_mat(file, PIECES)
    else:
        as_tuples = {split: [[tuple(frame) for frame in piece] for piece in pieces] for split, pieces in PIECES.items()}
        file.write_bytes(pickle.dumps(as_tuples, protocol=0))
    task = load_task("jsb", data=file, batch_size=2, hidden=8)
    assert [task.examples(split) for split in ("train", "valid", "test")] == [6, 1, 3]
    x, y, mask = next(iter(task.batches("test")))
    assert x.shape == y.shape == (2, 2, 88)
    assert mask.tolist() == [[True, True], [True, False]]
    assert [frame.nonzero().flatten().add(21).tolist() for frame in y.flatten(0, 1)] == [[60, 64], [60, 64], [72], []]
    assert not x[:, 0].any()  # nothing stands before the first frame
    assert torch.equal(x[:, 1], y[:, 0])
    assert [task.weight(batch) for batch in task.batches("test")] == [3]
    assert sum(task.weight(batch) for batch in task.batches("train", seed=1)) == 6


def test_padding_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(PIECES))
    task = load_task("jsb", data=file, batch_size=3, hidden=6)
    torch.manual_seed(0)
    model = task.model().eval()
    metrics = task.evaluate(model, "train")
    total = 0.0
    for piece in jsb.rolls(str(file))["train"]:
        h = [torch.zeros(1, 1, 88), *piece.float()[None, :-1].split(1, 1)]
        p = torch.sigmoid(model(torch.cat(h, 1)))[0]
        total -= torch.where(piece, p, 1 - p).log().sum().item()
    assert metrics["nll"] == pytest.approx(total / 6, rel=1e-5)


def test_network_that_knows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(PIECES))
    task = load_task("jsb", data=file, hidden=4)
    model = task.model()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert task.evaluate(model, "test")["nll"] == pytest.approx(88 * math.log(2), rel=1e-5)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file, mark = tmp_path / "evil.pickle", tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(mark),)

    file.write_bytes(pickle.dumps({"train": Evil()}))
    with pytest.raises(UnsafeError, match="Give the data as JSON") as caught:
        load_task("jsb", data=file).examples("train")
    assert caught.value.exit_code == 3
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"train": [[[9]]], "valid": [[[60]]], "test": [[[60]]]}',
        b'{"train": [], "valid": [], "test": []}',
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    for name in ("a.json", "a.pickle"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorruptError):
            load_task("jsb", data=tmp_path / name).examples("train")


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="no such file"):
        load_task("jsb", data=tmp_path / "a.json").examples("train")
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match="pip install --no-deps music21"):
        load_task("jsb").examples("train")


def part(name: str, *measures: str, number: int = 1) -> tuple[str, str]:
    body = "".join(f"<measure>{measure}</measure>" for measure in measures)
    head = f'<score-part id="P{number}"><part-name>{name}</part-name></score-part>'
    return head, f'<part id="P{number}">{body}</part>'


def note(pitch: str, duration: int, inside: str = "") -> str:
    step, alter, octave = pitch[0], {"#": 1, "b": -1}.get(pitch[1:-1], 0), pitch[-1]
    sound = (
        "<rest/>"
        if step == "R"
        else f"<pitch><step>{step}</step><alter>{alter}</alter><octave>{octave}</octave></pitch>"
    )
    return f"<note>{inside}{sound}<duration>{duration}</duration></note>"


def score(*parts: tuple[str, str]) -> str:
    heads, bodies = zip(*parts, strict=True)
    return f"<score-partwise><part-list>{''.join(heads)}</part-list>{''.join(bodies)}</score-partwise>"


TWO = "<attributes><divisions>2</divisions></attributes>"


GRACE = "<note><grace/><pitch><step>A</step><octave>3</octave></pitch></note>"
OCTAVE_DOWN = (
    "<attributes><transpose><chromatic>0</chromatic><octave-change>-1</octave-change></transpose></attributes>"
)
BACK = "<backup><duration>4</duration></backup>"
FORTH = "<forward><duration>2</duration></forward>"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part("Soprano", TWO + note("C4", 2) + note("F#4", 4))], [[60], [66], [66]]),
        # a quaver off the beat is not seen
        ([part("Alto", TWO + note("Bb3", 1) + note("C4", 1) + note("D4", 2))], [[58], [62]]),
        # silent frames are left out
        ([part("Alto", TWO + note("C4", 2) + note("R0", 4) + note("D4", 2))], [[60], [62]]),
        ([part("Bass", TWO + note("C3", 2) + note("E3", 2, "<chord/>"), note("G3", 2))], [[48, 52], [55]]),
        ([part("Bass", TWO + note("C3", 4) + BACK + note("E3", 2))], [[48, 52], [48]]),
        (
            [part("Bass", TWO + note("C3", 2) + BACK + FORTH + FORTH + note("E3", 2) + FORTH + note("E3", 2))],
            [[48], [52], [52]],
        ),
        ([part("Bass", TWO + GRACE + note("C3", 2))], [[48]]),
        ([part("Tenor", OCTAVE_DOWN + note("C4", 1))], [[48]]),
        # instruments are left out, unless there is nothing else
        ([part("Soprano", note("C5", 1)), part("Horn 1", note("C3", 2), number=2)], [[72]]),
        ([part("Flute", note("C5", 1)), part("Oboe", note("E4", 1), number=2)], [[64, 72]]),
        ([part("Soprano", "<attributes/>")], []),
    ],
)
def test_frames(parts: list[tuple[str, str]], expected: list[list[int]]) -> None:
    assert frames(ElementTree.fromstring(score(*parts))) == expected


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package music21 of ten small scores, and an empty cache folder."""
    folder = tmp_path / "music21" / "corpus" / "bach"
    folder.mkdir(parents=True)
    for number in range(10):
        with zipfile.ZipFile(folder / f"bwv{number}.mxl", "w") as archive:
            archive.writestr("META-INF/container.xml", "<container/>")
            archive.writestr("score.xml", score(part("Soprano", note("C4", 1), note("D4", number))))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "music21")])
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(_scores.metadata, "version", lambda name: "0.test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_chorales_are_split_by_name_and_cached(corpus: Path) -> None:
    splits = chorales()
    expected: dict[str, list[list[list[int]]]] = {"train": [], "valid": [], "test": []}
    for number in range(10):
        expected[split_of(f"bwv{number}.mxl", 20)].append([[60]] + [[62]] * number)
    assert splits == expected
    (cached,) = (corpus / "cache" / "kruify").iterdir()
    assert cached.name == "jsb-1-music21-0.test.json"
    for file in (corpus / "music21" / "corpus" / "bach").iterdir():
        file.unlink()
    assert chorales() == expected  # from the cache
    cached.write_text('{"train": [')
    assert chorales() == {"train": [], "valid": [], "test": []}  # a damaged cache is made anew


def test_a_cache_that_cannot_be_written_is_done_without(corpus: Path) -> None:
    (corpus / "cache").write_text("a file where the folder should be")
    assert sum(len(pieces) for pieces in chorales().values()) == 10


@installed
def test_installed_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = load_task("jsb")
    assert [task.examples(split) for split in ("train", "valid", "test")] == [12_800, 4804, 5014]
    train, test = (torch.cat(jsb.rolls(None)[split]).double() for split in ("train", "test"))
    p = train.mean(0).clamp(1e-6, 1 - 1e-6)
    nll = -(test * p.log() + (1 - test) * (1 - p).log()).sum(1).mean()
    assert float(nll) == pytest.approx(11.33, abs=0.005)


def test_broken_mat_files(tmp_path: Path) -> None:
    file = tmp_path / "a.mat"
    for content in (b"", b"no matlab" * 100):
        file.write_bytes(content)
        with pytest.raises(CorruptError, match="not a file of pieces"):
            jsb.read(file)
    savemat(file, {"train": np.ones((2, 88))})
    with pytest.raises(CorruptError, match="not a file of pieces: KeyError"):
        jsb.read(file)
    write_mat(file, PIECES)
    narrow = np.empty((1, 1), dtype=object)
    narrow[0, 0] = np.ones((3, 87))
    savemat(file, {f"{split}data": narrow for split in PIECES})
    with pytest.raises(CorruptError, match=r"a piece of shape \(3, 87\)"):
        jsb.read(file)


def test_piano_midi_is_the_same_task_on_another_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Piano-midi\.de is in no package"):
        load_task("piano-midi")
    file = tmp_path / "Piano-midi.de.pickle"
    file.write_bytes(pickle.dumps(PIECES))
    task = load_task(f"piano-midi:data={file},hidden=4")
    assert task.examples("train") == 6
    model = task.model()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert task.evaluate(model, "test")["nll"] == pytest.approx(88 * math.log(2), rel=1e-5)
    assert f"{88 * math.log(2):.1f}" in task.chance
