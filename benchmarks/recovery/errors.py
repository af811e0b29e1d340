"""What an error of one matrix costs, the others dense: the rise of the loss for the energy that low rank of it loses.

python benchmarks/recovery/errors.py [TASK ...]      the dense networks that run.py has trained
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from grid import CONVERGED, TASKS, Run
from train import CACHE, dense_network

from kruify import convert
from kruify.conversion.calibration import calibrate
from kruify.conversion.locate import locate
from kruify.conversion.plan import make_plan
from kruify.conversion.sensitivity import LEAST_LOST, mean_loss
from kruify.tasks.loader import load_task

TIMES = (4, 8, 16)  # fewer numbers


def main() -> None:
    for name in sys.argv[1:] or ("fashion", "jsb", "g2p"):
        task = load_task(TASKS[name].name)
        dense = dense_network(Run(name, CONVERGED), task, CACHE)
        moments, layers, before = calibrate(dense, task), locate(dense).layers, mean_loss(dense, task)
        for layer in layers:
            for stem in layer.weights:
                weight, (rows, cols) = layer.full_name(stem), layer.shape(stem)
                rows *= len(layer.gates)
                w = dense.get_parameter(weight).detach().double()
                energy = float(((w @ moments[weight].weight(layer.bias)) * w).sum())
                for times in TIMES:
                    rank = max(1, rows * cols // times // (rows + cols))
                    plan = make_plan(
                        layers, "dense", "dense", overrides={weight: f"stacked:{rank}*({rows}x1,1x{cols})"}
                    )
                    small, conversion = convert(dense, plan=plan, moments=moments)
                    lost = energy * (1 - (conversion.matrices[0].energy_weighted or 0.0))
                    if lost > LEAST_LOST * energy:
                        rise = mean_loss(small, task) - before
                        print(f"{name} {weight} rank {rank}: {lost:.3g} lost, loss +{rise:.4f}, {rise / lost:.2g} each")


if __name__ == "__main__":
    main()
