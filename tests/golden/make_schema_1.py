"""Made `schema_1.safetensors`, `schema_1.pt` and `schema_1_outputs.pt` at commit 67ab7fa: converted files of the first
schema, with what their layers compute.

    python tests/golden/make_schema_1.py FOLDER

It writes that schema with that commit only: the files stand for what users have on their disks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import kruify
from kruify import layers


def network() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "lstm": layers.KRULSTM(4, 8, factors="2*(4x2,2x4)+diag+sparse:10%:4", input_factors="8x1,1x4+sparse:10%:1"),
            "gru": layers.KRUGRU(4, 8, factors="stacked:2*(24x1,1x8)", bidirectional=True),
            "rnn": layers.KRURNN(4, 8, factors="2x2"),
            "kru": layers.KRU(4, 8, factors="2x2"),
            "out": nn.Linear(8, 3),
        }
    )


def main(name: str, stored: Callable[[nn.ModuleDict], nn.ModuleDict]) -> None:
    torch.manual_seed(0)
    folder, net = Path(sys.argv[1]), network()
    for values in (net["lstm"].weight_hh_l0.overlay.values, net["lstm"].weight_ih_l0.overlay.values):
        nn.init.normal_(values)
    x, net = torch.randn(5, 3, 4), stored(net)
    with torch.no_grad():
        outputs = {layer: net[layer](x)[0] for layer in net if layer != "out"}
    kruify.save(net, folder / f"{name}.safetensors", seed=3)
    kruify.save(net, folder / f"{name}.pt", seed=3)
    torch.save({"input": x, "outputs": outputs}, folder / f"{name}_outputs.pt")


if __name__ == "__main__":
    main("schema_1", lambda net: net)
