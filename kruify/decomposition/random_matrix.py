"""How much energy products of factors keep of a matrix without structure, from the law of its singular values."""

from __future__ import annotations

import numpy as np


def gaussian_energy(m: int, n: int, rank: int) -> float:
    """Expected share of the `rank` largest squared singular values of an (m, n) matrix of independent Gaussians.

    Marchenko & Pastur (1967): with c = min/max, the squared singular values over max(m, n) have the density
    sqrt((b - x)(x - a)) / (2 pi c x) on [a, b] = [(1 - sqrt c)^2, (1 + sqrt c)^2]. For one term this is close to the
    edge, (sqrt m + sqrt n)^2 / (m n). Accurate to about one percent from a shorter side of 100 on.
    """
    short, long = min(m, n), max(m, n)
    if rank >= short:
        return 1.0
    c = short / long
    centre, radius = 1 + c, 2 * np.sqrt(c)
    # x = centre + radius cos t makes the density smooth; t counts from the upper edge.
    t = np.linspace(0, np.pi, 200_001)
    x = np.maximum(centre + radius * np.cos(t), 1e-12)  # a square matrix: 0/0 at the lower edge
    density = (radius * np.sin(t)) ** 2 / (2 * np.pi * c * x)
    step = t[1] - t[0]
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * step])
    energy = np.concatenate([[0.0], np.cumsum((density[1:] * x[1:] + density[:-1] * x[:-1]) / 2) * step])
    return float(np.interp(rank / short, mass / mass[-1], energy / energy[-1]))
