"""Ranks of the low-rank matrices of several graphs: each goes to the matrix that it pays most in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.conversion.beside import NARROW
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import Plan, keeps_scales, make_plan
from kruify.decomposition.fitting import metric_of
from kruify.decomposition.weighted import Weighted
from kruify.search.candidates import EVERYTHING
from kruify.search.source_graph import SourceGraph


@dataclass(frozen=True)
class Stack:
    """A matrix with its gates stacked, (rows, cols), by its name in a graph."""

    graph: SourceGraph
    name: str
    rows: int
    cols: int
    scaled: bool

    @property
    def low_rank_numbers(self) -> int:
        """Of one rank."""
        return self.rows + self.cols + self.scaled


class GraphRanks:
    """Low rank of the stacked gates of all matrices that are not narrow.

    Attributes:
        spectra: every matrix -> E||W h||^2 that each singular triplet of it keeps on the samples, the heaviest first:
            pre-activations, whose units are those of all layers. What no sample reaches counts as if h were white.
    """

    def __init__(self, graphs: Sequence[SourceGraph], moments: Mapping[SourceGraph, Mapping[str, Moments]]) -> None:
        self.graphs, self.spectra = graphs, dict[Stack, Tensor]()
        for graph in graphs:
            plan = stacked_low_rank(list(graph.layers.values()), 1.0) if graph.layers else None
            for layer, weight, (structure, *_) in plan.matrices() if plan is not None else ():
                name = layer.full_name(weight)
                stack = Stack(graph, name, structure.rows, structure.cols, structure.scaled)
                weighted = graph.tensors[name].load().double()
                if name in moments[graph]:
                    metric = metric_of(moments[graph][name].weight(layer.bias), structure.cols)
                    assert isinstance(metric, Weighted)
                    weighted = weighted @ metric.root
                self.spectra[stack] = torch.linalg.svdvals(weighted).square()

    def plans(self, share: float) -> list[Plan]:
        """A plan for each graph: this share of the numbers, and the most of what all matrices together give on the
        samples. Where low rank would be no smaller than a matrix, that stays dense."""
        spectra = self.spectra
        if not spectra:
            return [Plan() for _ in self.graphs]
        gains = torch.cat([energies / s.low_rank_numbers for s, energies in spectra.items()])
        owners = torch.cat([torch.full((len(energies),), n) for n, energies in enumerate(spectra.values())])
        owners = owners[gains.argsort(descending=True, stable=True)]
        sizes = torch.tensor([s.low_rank_numbers for s in spectra])[owners]
        taken = owners[sizes.cumsum(0) <= share * sum(s.rows * s.cols for s in spectra)]
        ranks = torch.bincount(taken, minlength=len(spectra)).clamp(min=1).tolist()
        specs: dict[SourceGraph, dict[str, list[str]]] = {graph: {} for graph in self.graphs}
        for s, rank in zip(spectra, ranks, strict=True):
            if rank * s.low_rank_numbers < s.rows * s.cols:
                specs[s.graph][s.name] = [f"stacked:{rank}*({s.rows}x1,1x{s.cols})"]
        return [
            make_plan(list(graph.layers.values()), "dense", "dense", chosen=found) for graph, found in specs.items()
        ]


def stacked_low_rank(layers: Sequence[RecurrentLayer], share: float) -> Plan | None:
    """Low rank of stacked gates that keeps this share of the numbers of every matrix that is not narrow; None where
    not even rank 1 does."""
    specs = {
        layer.full_name(weight): _stacked_low_rank(layer, *layer.shape(weight), share)
        for layer in layers
        for weight in layer.weights
        if layer.shape(weight)[1] >= NARROW
    }
    return EVERYTHING.plan(layers, specs)


def _stacked_low_rank(layer: RecurrentLayer, rows: int, cols: int, share: float) -> str | None:
    """A spec of all gates of one matrix, (rows, cols) each; None where not even rank 1 fits."""
    rows *= len(layer.gates)
    rank = int(share * rows * cols) // (rows + cols + keeps_scales(layer))
    return f"stacked:{rank}*({rows}x1,1x{cols})" if rank else None
