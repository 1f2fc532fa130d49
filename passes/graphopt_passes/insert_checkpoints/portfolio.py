"""Starting points of the search: sets of storages worth saving, from minimum cuts.

If operators above some price must not run again, the fewest bytes that make the backward possible
are a minimum cut between what must not run again and what the backward reads (Chen et al. 2016
count layers; torch's partitioner cuts nodes the same way). Sweeping the price from nothing to
everything gives a family of plans from "recompute what is nearly free" to "recompute all that may
be". Blends take one member for the early part of the network and the next for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["blends", "fused_seeds", "kept_with", "minimum_cut", "price_levels", "seeds", "steps_between"]

_INLINE = 1e-3
"""Share of its price alone that an operator costs in the kernel of its reader: it breaks ties."""

_UNIT = 256
"""Bytes per unit of flow: the solver counts in 32 bits."""


def price_levels(prices: Sequence[float], count: int) -> list[float]:
    """Up to ``count`` thresholds among the distinct prices, least first: two in three evenly by rank,
    the rest below the widest jumps, where a class of operators (products, attention) begins."""
    distinct = sorted(set(prices))
    if len(distinct) <= count:
        return distinct
    wide = count // 3
    jumps = sorted(range(len(distinct) - 1), key=lambda k: distinct[k] / distinct[k + 1])
    even = (round(k * (len(distinct) - 1) / (count - wide - 1)) for k in range(count - wide))
    return [distinct[k] for k in sorted({*even, *jumps[:wide]})]


def minimum_cut(model: StepModel, prices: Sequence[float], limit: float) -> frozenset[int]:
    """The fewest bytes to save such that no operator dearer than ``limit`` runs again."""
    storages = len(model.size)
    source, sink = 2 * storages, 2 * storages + 1
    # Storage b is the edge 2b -> 2b+1, of capacity its size; cutting it means saving it.
    scale = max(_UNIT, sum(model.size) // 2**30 + 1)
    endless = 2**31 - 1
    edges: dict[tuple[int, int], int] = {}
    for b, size in enumerate(model.size):
        capacity = 0 if model.free[b] else min(max(1, size // scale), 2**30)
        edges[2 * b, 2 * b + 1] = capacity if model.savable[b] or model.free[b] else endless
    for i, outputs in enumerate(model.outputs):
        allowed = model.again[i] and (prices[i] <= limit or not all(model.savable[b] for b in outputs))
        for made in outputs:
            if not allowed:
                edges[source, 2 * made] = endless
            else:
                for read in model.inputs[i]:
                    edges[2 * read + 1, 2 * made] = endless
    for slot in model.slots:
        for b in slot.reads:
            edges[2 * b + 1, sink] = endless
    keys = np.array(list(edges), dtype=np.int64)
    capacities = np.array(list(edges.values()), dtype=np.int32)
    graph = csr_matrix((capacities, (keys[:, 0], keys[:, 1])), shape=(2 * storages + 2,) * 2)
    residual = (graph - maximum_flow(graph, source, sink).flow).tocsr()
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    near = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
    return frozenset(
        b for b in range(storages) if 2 * b in near and 2 * b + 1 not in near and not model.free[b]
    )


def seeds(model: StepModel, prices: Sequence[float], count: int) -> list[frozenset[int]]:
    """Saved sets of the sweep, fewest recomputations first, without repeats."""
    found: list[frozenset[int]] = []
    for limit in price_levels(prices, count):
        cut = minimum_cut(model, prices, limit)
        if cut not in found:
            found.append(cut)
    return found


def fused_seeds(
    model: StepModel, prices: Sequence[float], alone: Sequence[bool], count: int
) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
    """Saved sets for generated kernels: by what a library call costs, and by that per byte of its results.

    ``alone[i]``: whether operator i is a kernel of its own. All others are computed in the kernels of
    their readers: made again they cost next to nothing, while to hand their results over costs a write and
    a read that the kernels would do without. So library calls alone decide what is worth its bytes. In order
    of seconds for each byte the family runs through what a sum over many programs gives up first.
    """
    again = [price if own else price * _INLINE for price, own in zip(prices, alone, strict=True)]
    dense = [
        price / max(sum(model.size[b] for b in outputs), 1)
        for price, outputs in zip(again, model.outputs, strict=True)
    ]
    return seeds(model, again, count), seeds(model, dense, count)


def kept_with(
    model: StepModel, saved: frozenset[int], made: Sequence[int], alone: Sequence[bool]
) -> Iterator[frozenset[int]]:
    """``saved`` and more and more of what operators ``made`` again have to put into memory, largest first:
    what a library call reads is there in the forward anyway, and to keep it saves a write."""
    read = {b for i, own in enumerate(alone) if own for b in model.inputs[i]}
    there = {b for i in made for b in model.outputs[i] if model.savable[b] and b in read}
    ordered = sorted(there - saved, key=lambda b: (-model.size[b], b))
    for size in sorted({model.size[b] for b in ordered}, reverse=True):
        yield saved | {b for b in ordered if model.size[b] >= size}


def blends(model: StepModel, family: Sequence[frozenset[int]], parts: int) -> Iterator[frozenset[int]]:
    """Neighbours of a family mixed: the later one up to some operator, the earlier one after it."""
    count = len(model.operators)
    for first, second in pairwise(family):
        for part in range(1, parts):
            border = count * part // parts
            yield frozenset(
                {b for b in second if model.maker[b] < border}
                | {b for b in first if model.maker[b] >= border}
            )


def steps_between(
    model: StepModel, prices: Sequence[float], family: Sequence[frozenset[int]], steps: int = 8
) -> Iterator[frozenset[int]]:
    """From each member of a family to the next, a few storages at a time, cheapest per byte first."""
    for first, second in pairwise(family):
        dropped = sorted(
            first - second,
            key=lambda b: (prices[model.maker[b]] / max(model.size[b], 1), -model.size[b], b),
        )
        for step in range(1, steps):
            given_up = dropped[: len(dropped) * step // steps]
            yield (first - frozenset(given_up)) | second
            yield first - frozenset(given_up)
