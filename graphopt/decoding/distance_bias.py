"""Biases of attention that are a function of how far a query is from a key, T5's (Raffel et al. 2020) among
them::

    s[q, k] += bias[head, position[q] - position[k]]

The part of a graph that makes one is looked at, as that of a mask is: a column of what it adds is the whole
function, and all else that it adds has to agree with it. The function is kept as a table [H, capacity]. It is
made of weights, so it is made anew where those were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from graphopt import _torch
from graphopt.capture.aliasing import alias_map
from graphopt.decoding.capture import Uncached
from graphopt.decoding.closure import closure
from graphopt.decoding.evaluate import added_by
from graphopt.decoding.masks import distances
from graphopt.decoding.regions import Region

if TYPE_CHECKING:
    from graphopt.decoding.sites import Site

__all__ = ["DistanceBias", "biased_by", "distance_biases"]


@dataclass
class DistanceBias:
    """``table`` float32 [H, capacity] of what ``region`` adds to scores, by how far the key is before the
    query; ``renew`` brings it up to date."""

    uncached: Uncached
    region: Region
    capacity: int
    table: torch.Tensor = field(init=False)
    _made_of: tuple[torch.Tensor, ...] = field(init=False)
    _state: tuple[object, ...] | None = None

    def __post_init__(self) -> None:
        graph = self.uncached.gm.graph
        nodes = [entry.node for entry in self.region.added if entry.node is not None]
        made_of = (node.name for node in closure(nodes, alias_map(graph)) if node.op == "placeholder")
        weights = self.uncached.weights
        self._made_of = tuple(weights[name] for name in made_of if name in weights)
        device = self.uncached.placeholder(self.uncached.tokens).meta["val"].device
        self.table = torch.zeros(self.region.heads, self.capacity, device=device)
        self.renew()

    def renew(self) -> None:
        """Make the table of the weights as they are, if they are others than before."""
        state = tuple((tensor.data_ptr(), _torch.writes(tensor)) for tensor in self._made_of)
        if state == self._state and None not in (writes for _, writes in state):
            return
        evaluate, _ = added_by(self.uncached, self.region, alias_map(self.uncached.gm.graph))
        takes_mask = self.uncached.mask is not None
        self.table.copy_(distances(evaluate, self.capacity, self.table.device, takes_mask=takes_mask))
        self._state = state


def biased_by(sites: Sequence[Site]) -> dict[int, str]:
    """For each site with such a bias the name of its table: one for all that add the same."""
    names: dict[str, str] = {}
    return {
        index: names.setdefault(site.spec.mask.bias, f"bias_{len(names)}")
        for index, site in enumerate(sites)
        if site.spec.mask.bias
    }


def distance_biases(uncached: Uncached, sites: Sequence[Site], capacity: int) -> dict[str, DistanceBias]:
    """The biases of ``sites``, by name."""
    regions = {name: sites[index].region for index, name in reversed(biased_by(sites).items())}
    return {name: DistanceBias(uncached, region, capacity) for name, region in sorted(regions.items())}


