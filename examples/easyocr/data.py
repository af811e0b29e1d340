"""Lines of text with their labels, easyocr's English recogniser as an ONNX graph, and what its scores say.

`kruify compress` calls `samples` (--inputs), which gives images alone. The network is written out, after easyocr's
`vgg_model` (Apache-2.0): convolutions, two bidirectional LSTMs of 256 units (Shi et al. 2015, "An End-to-End Trainable
Neural Network for Image-based Sequence Recognition"), CTC. A checkpoint that does not fit it is refused by torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))
from showcase import session

FOLDER = Path("easyocr-out")
HEIGHT, LONGEST = 64, 40  # pixels of an image; characters of a line
COUNTS = {"train": 192, "test": 300}
ROOT = Path("/usr/share/fonts")
FONTS = {
    "train": ["liberation/LiberationS*.ttf", "freefont/FreeS*.ttf", "unhinted/RobotoTTF/Roboto-[BIMR]*.ttf"],
    "test": [
        "dejavu/DejaVuS*.ttf",
        "lato/Lato-[BIMR]*.ttf",
        "ebgaramond/EBGaramond12-*.otf",
        "open-sans/OpenSans-[BIRS]*",
    ],
}
PACKAGES = ["liberation", "freefont-ttf", "roboto-unhinted", "dejavu", "lato", "ebgaramond", "open-sans"]
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORD = re.compile(rf"[{re.escape(CHARACTERS)}]*[0-9A-Za-z][{re.escape(CHARACTERS)}]*".replace("\\ ", ""))
Picture = NDArray[np.float32]  # (1, 1, HEIGHT, width), -1 to 1


def samples() -> Iterator[dict[str, Picture]]:
    """What the network is fed with, line by line of the train split: no labels."""
    for image, _ in lines("train"):
        yield {"image": image}


@cache
def fonts(split: str) -> list[Path]:
    """Files of a split, upright and slanted, light and bold; no family is in both."""
    found = [sorted(ROOT.glob(f"**/{pattern}")) for pattern in FONTS[split]]
    if not all(found):
        sys.exit("apt install " + " ".join(f"fonts-{package}" for package in PACKAGES))
    return [file for files in found for file in files]


def lines(split: str) -> Iterator[tuple[Picture, str]]:
    """Images and what is written there: pieces of the manual that comes with Python, other chapters for each split."""
    numbers = np.random.default_rng(len(split))
    chapters = sorted(topics)[split == "test" :: 2]
    for _ in range(COUNTS[split]):
        words = WORD.findall(topics[chapters[numbers.integers(len(chapters))]])
        start, count = numbers.integers(len(words)), numbers.integers(2, 8)
        text = " ".join(words[start : start + count])[:LONGEST].strip()
        yield picture(text, split, numbers), text


def picture(text: str, split: str, numbers: np.random.Generator) -> Picture:
    """A line, printed and photographed not too well: size, slope, contrast, blur and noise are drawn."""
    files = fonts(split)
    font = ImageFont.truetype(str(files[numbers.integers(len(files))]), int(numbers.integers(14, 33)))
    left, top, right, bottom = font.getbbox(text)
    margin = int(numbers.integers(2, 8))
    paper = numbers.uniform(150, 255)
    ink = paper - numbers.uniform(80, 150)
    if numbers.random() < 0.3:
        paper, ink = ink, paper
    size = (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin)
    image = Image.new("L", size, round(paper))
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill=round(ink))
    image = image.rotate(numbers.normal(0, 0.5), Image.Resampling.BICUBIC, expand=True, fillcolor=round(paper))
    image = image.filter(ImageFilter.GaussianBlur(numbers.uniform(0, 1)))
    grey = np.asarray(image) + numbers.normal(0, numbers.uniform(0, 10), image.size[::-1])
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    width = int(np.ceil(HEIGHT * image.width / image.height))  # what follows is easyocr's
    grey = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    return (grey / 127.5 - 1)[None, None]


def text_of(scores: NDArray[np.float32]) -> str:
    """Of one line (steps, 97): the best class of each step, repeats and blanks (0) left out."""
    best = scores.argmax(-1)
    kept = best[(best != 0) & (best != np.r_[0, best[:-1]])]
    return "".join(CHARACTERS[number - 1] for number in kept)


def edits(read: Sequence[str], label: Sequence[str]) -> int:
    """Insertions, deletions and substitutions of characters or words (Levenshtein)."""
    before = list(range(len(label) + 1))
    for row, one in enumerate(read, 1):
        now = [row]
        for column, other in enumerate(label, 1):
            now.append(min(now[-1] + 1, before[column] + 1, before[column - 1] + (one != other)))
        before = now
    return before[-1]


def error_rates(model: str | Path) -> dict[str, float]:
    """Of the test lines: edits for each character and each word of the labels, and lines that are not read right."""
    network, counts = session(model), np.zeros(5)
    for image, label in lines("test"):
        read = text_of(network.run(None, {"image": image})[0][0])
        counts += [
            edits(read, label),
            len(label),
            edits(read.split(), label.split()),
            len(label.split()),
            read != label,
        ]
    return {
        "character_error": counts[0] / counts[1],
        "word_error": counts[2] / counts[3],
        "line_error": counts[4] / COUNTS["test"],
    }


class BidirectionalLSTM(nn.Module):
    """(batch, steps, 256) -> (batch, steps, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Recogniser(nn.Module):
    """(batch, 1, HEIGHT, width) -> scores (batch, width // 4 - 1, 97). Its names are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(inputs: int, outputs: int, kernel: int = 3, normal: bool = False) -> list[nn.Module]:
            first = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 3, bias=not normal)
            return [first, nn.BatchNorm2d(outputs), nn.ReLU()] if normal else [first, nn.ReLU()]

        self.FeatureExtraction = nn.Module()
        self.FeatureExtraction.ConvNet = nn.Sequential(
            *convolution(1, 32),
            nn.MaxPool2d(2),
            *convolution(32, 64),
            nn.MaxPool2d(2),
            *convolution(64, 128),
            *convolution(128, 128),
            nn.MaxPool2d((2, 1)),
            *convolution(128, 256, normal=True),
            *convolution(256, 256, normal=True),
            nn.MaxPool2d((2, 1)),
            *convolution(256, 256, kernel=2),
        )
        self.SequenceModeling = nn.Sequential(BidirectionalLSTM(), BidirectionalLSTM())
        self.Prediction = nn.Linear(256, len(CHARACTERS) + 1)

    def forward(self, image: Tensor) -> Tensor:
        columns = self.FeatureExtraction.ConvNet(image).mean(2).transpose(1, 2)  # (batch, steps, 256)
        return self.Prediction(self.SequenceModeling(columns))
