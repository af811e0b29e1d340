"""Would a diagonal of each gate beside low rank of stacked gates pay? What both keep of W_hh, before training.

    python benchmarks/recovery/diagonals.py [TASK ...]      the dense networks that run.py has trained

Prints, by matrix and share of its numbers, the (weighted) energy kept by low rank, by that and a diagonal for each gate
(both fitted in turns), and by low rank with as many numbers more, ranks counted in fractions.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from grid import CONVERGED, TASKS, Run
from torch import Tensor
from train import CACHE, dense_network

from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import locate
from kruify.decomposition.weighted import Weighted
from kruify.tasks.loader import load_task

SHARES, ROUNDS = (1 / 16, 1 / 8, 1 / 4), 30


def kept(w: Tensor, metric: Weighted, share: float) -> tuple[int, float, float, float]:
    """Rank at a share of the numbers of (gates * n, n) `w`, and the energy of the three structures."""
    rows, n = w.shape
    rank, total = int(share * w.numel()) // (rows + n), metric.error(w)
    values = torch.linalg.svdvals(w @ metric.root).square() / total
    alone = float(values[:rank].sum())
    more = alone + rows / (rows + n) * float(values[rank])
    diagonals, fitted = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(ROUNDS):
        left, weight, right = torch.linalg.svd((w - diagonals) @ metric.root, full_matrices=False)
        fitted = (left[:, :rank] * weight[:rank]) @ right[:rank] @ metric.inverse_root
        gates = (w - fitted).reshape(-1, n, n)
        diagonals = torch.cat([metric.diagonal(gate).diag() for gate in gates])
    return rank, alone, 1 - metric.error(w - fitted - diagonals) / total, more


def main() -> None:
    for name in sys.argv[1:] or ("fashion", "jsb", "g2p"):
        task = load_task(TASKS[name].name)
        dense = dense_network(Run(name, CONVERGED), task, CACHE)
        moments = calibrate(dense, task)
        for layer in locate(dense).layers:
            for weight in (layer.full_name(f"weight_hh{suffix}") for suffix in layer.suffixes):
                metric = Weighted(moments[weight].weight(layer.bias))
                for share in SHARES:
                    rank, *energies = kept(dense.get_parameter(weight).detach().double(), metric, share)
                    cells = "  ".join(f"{energy:.4f}" for energy in energies)
                    print(f"{name} {weight} 1/{1 / share:.0f} rank {rank}: {cells}", flush=True)


if __name__ == "__main__":
    main()
