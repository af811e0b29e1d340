"""Made `modules_0.1.0.pt` at commit b91d677: whole modules as torch.save pickled them, with what they compute.

    python tests/golden/make.py OUT.pt

It runs with that commit only: the file stands for what users saved before the modules moved.
"""

from __future__ import annotations

import sys

import torch

from kruify import layers


def networks() -> dict[str, torch.nn.Module]:
    return {
        "lstm": layers.KRULSTM(4, 8, 2, bidirectional=True, factors="2*(4x2,2x4)+diag+sparse:10%:4"),
        "lstm_projected": layers.KRULSTM(4, 8, proj_size=4, factors="4x2,2x2"),
        "gru": layers.KRUGRU(4, 8, factors="stacked:2*(24x1,1x8)"),
        "rnn": layers.KRURNN(4, 8, nonlinearity="relu", factors="2x2", bias=False),
        "lstm_cell": layers.KRULSTMCell(4, 8, factors="4x2,2x4"),
        "gru_cell": layers.KRUGRUCell(4, 8, factors="stacked:2*(24x1,1x8)"),
        "rnn_cell": layers.KRURNNCell(4, 8, factors="2x2"),
        "kru": layers.KRU(4, 8, factors="2x2"),
    }


def main() -> None:
    torch.manual_seed(0)
    saved = {}
    for name, module in networks().items():
        x = torch.randn(3, 4) if name.endswith("cell") else torch.randn(5, 3, 4)
        with torch.no_grad():
            found = module(x)
        saved[name] = {"module": module, "input": x, "output": found}
    torch.save(saved, sys.argv[1])


if __name__ == "__main__":
    main()
