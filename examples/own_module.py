"""Your own module in 30 lines: train it, convert it, train on in your own loop, save, load, export.

    python examples/own_module.py            about a minute
    python examples/own_module.py --quick    a few seconds

The task is a toy: say whether brackets are balanced so far, at every position of a random string of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import kruify
from kruify.exporting import export_onnx


class Tagger(nn.Module):  # any module with an nn.LSTM, nn.GRU or nn.RNN in it
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 16)
        self.rnn = nn.LSTM(16, 128, batch_first=True)
        self.out = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(self.embed(x))[0]).squeeze(-1)
        return y


def batch(size: int = 64, steps: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randint(2, (size, steps))
    return x, (x * 2 - 1).cumsum(1).eq(0).float()  # balanced where as many were closed as opened


def train(model: nn.Module, steps: int) -> float:  # your own loop, unchanged by kruify
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        x, y = batch()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = batch(1000)
    with torch.no_grad():
        return ((model(x) > 0) == y.bool()).float().mean().item()


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = Tagger()
    print(f"dense      {sum(p.numel() for p in model.parameters()):7,} parameters, accuracy {train(model, steps):.3f}")

    small, report = kruify.convert(model, "2*(16x8,8x16)", input_factors="8*(128x1,1x16)")  # `model` is untouched
    count = sum(p.numel() for p in small.parameters())
    print(f"converted  {count:7,} parameters, accuracy {train(small, 0):.3f}")
    print(f"           recurrent matrices {report.parameters.recurrent_ratio:.0f}x smaller")
    print(f"trained on {count:7,} parameters, accuracy {train(small, steps):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tagger.kru.safetensors"
        kruify.save(small, file)
        loaded = kruify.load(file, into=Tagger())  # the dense module: its layer is swapped for what the file holds
        x, _ = batch(2)
        assert torch.equal(loaded(x), small(x))
        exported = export_onnx(loaded.rnn, Path(folder) / "rnn.onnx")  # the layer, for a machine without torch
        print(f"saved in {file.stat().st_size:,} bytes; ONNX layer differs by {exported.difference:.0e}")


if __name__ == "__main__":
    main(steps=30 if "--quick" in sys.argv else 600)
