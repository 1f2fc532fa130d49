"""Finding regions of a semantic graph that treat the slices of one dimension apart.

A region grows from a value and one of its dimensions: every operator behind it belongs to the region as
long as it passes the cut on (``rows``). What reads a value that left the region cannot come back into it,
as all slices must be through before. So a region is as large as it can be: a token-wise segment from one
attention to the next, or all layers of a network along the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.structure import Line
from graphopt.edit import Edit
from graphopt.order import has_effect
from graphopt.program import Program, tensor_leaves
from graphopt_passes.chunk.rows import follow, is_view, shape_of

__all__ = ["AXES", "Place", "Region", "Through", "bytes_of", "grow", "regions"]

AXES = ("batch", "positions")

Through: TypeAlias = Callable[[fx.Node, Mapping[fx.Node, int]], dict[fx.Node, int] | Reason]
"""Which dimensions become known if a node is passed that reads values that are cut, or why it is not."""


@dataclass(frozen=True)
class Region:
    """``cuts`` says which dimension of each entry and each node is cut, into ``extent`` groups at most.

    ``entries`` come from outside and are sliced, ``exits`` are read outside. ``stops`` say what ended it.
    """

    nodes: tuple[fx.Node, ...]
    cuts: Mapping[fx.Node, int]
    extent: int
    stops: tuple[Reason, ...] = ()

    @property
    def entries(self) -> tuple[fx.Node, ...]:
        inside = set(self.nodes)
        read = {source: None for node in self.nodes for source in node.all_input_nodes}
        return tuple(source for source in read if source in self.cuts and source not in inside)

    @property
    def exits(self) -> tuple[fx.Node, ...]:
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        """What makes new values that nothing outside reads."""
        exits = set(self.exits)
        return tuple(node for node in self.nodes if node not in exits and not is_view(node))

    @property
    def boundary_bytes(self) -> int:
        return sum(map(bytes_of, (*self.entries, *self.exits)))

    @property
    def inner_bytes(self) -> int:
        return sum(map(bytes_of, self.inner))

    @property
    def largest(self) -> int:
        """Elements of the largest value inside."""
        return max((leaf.numel() for node in self.inner for leaf in _leaves(node)), default=0)


@dataclass(frozen=True)
class Place:
    """A region by the names of its nodes, to be found in a copy of the program in which other regions
    may be sliced already: ``sources`` are the cut dimensions of what a node reads, in its order."""

    nodes: tuple[str, ...]
    dims: tuple[int, ...]
    sources: tuple[tuple[int | None, ...], ...]
    extent: int

    @classmethod
    def of(cls, region: Region) -> Place:
        return cls(
            tuple(node.name for node in region.nodes),
            tuple(region.cuts[node] for node in region.nodes),
            tuple(tuple(map(region.cuts.get, node.all_input_nodes)) for node in region.nodes),
            region.extent,
        )

    def found(self, edit: Edit) -> Region:
        """The region in the program that is edited. Raises ``PassError`` where a node is gone."""
        nodes = tuple(map(edit.node, self.nodes))
        cuts = dict(zip(nodes, self.dims, strict=True))
        for node, dims in zip(nodes, self.sources, strict=True):
            read = zip(node.all_input_nodes, dims, strict=True)
            cuts.update((source, dim) for source, dim in read if dim is not None)
        return Region(nodes, cuts, self.extent)


def regions(program: Program, line: Line, axis: str) -> Iterator[Region]:
    """The regions along an axis in the order of their first nodes; no two share a node.

    "batch" is the first dimension of values, "positions" (in a sequence, in an image) any other but the last.
    """
    roles = {spec.node: spec.role for spec in program.signature.inputs}
    claimed: set[fx.Node] = set()
    for seed in program.graph.nodes:
        is_input = seed.op == "placeholder" and roles.get(seed.name) in ("input", "activation")
        computed = seed in line.position and not is_view(seed)
        if seed in claimed or not (is_input or computed) or not _is_cuttable(seed):
            continue
        shape = shape_of(seed)
        dims = (0,) if axis == "batch" else range(1, len(shape) - 1)
        grown = [grow(line, seed, dim, claimed, _even(shape[dim])) for dim in dims if shape[dim] > 1]
        best = max(grown, key=lambda region: region.inner_bytes, default=None)
        if best is not None and best.nodes:
            claimed.update(best.nodes)
            yield best


def bytes_of(node: fx.Node) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in _leaves(node))


def _leaves(node: fx.Node) -> list[torch.Tensor]:
    return tensor_leaves(node.meta.get("val"))


def _is_cuttable(node: fx.Node) -> bool:
    """Whether it is one tensor, of two dimensions or more, whose sizes are numbers."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dim() > 1
        and all(type(size) is int for size in value.shape)
    )


def _even(extent: int) -> Through:
    """Operators that treat ``extent`` groups apart."""

    def through(node: fx.Node, cuts: Mapping[fx.Node, int]) -> dict[fx.Node, int] | Reason:
        found = follow(node, cuts, extent)
        if isinstance(found, Reason):
            return found
        if any(shape_of(other)[dim] % extent for other, dim in found.sliced.items()):
            return Reason("its operands are of other sizes", (node.name,))
        return {**found.sliced, node: found.dim}

    return through


def grow(line: Line, seed: fx.Node, dim: int, claimed: Set[fx.Node], through: Through) -> Region:
    """The region behind a value that is cut along ``dim``, without the nodes ``claimed`` by others."""
    cuts = {seed: dim}
    inside: list[fx.Node] = []
    left: set[fx.Node] = set()
    """What depends on a value that left the region."""
    stops: list[Reason] = []
    ambient = None
    # Nodes after the last that reads a value of the region cannot belong to it.
    reach = _last_read(line, [seed])
    for position in range(line.position.get(seed, -1) + 1, len(line.nodes)):
        if position > reach:
            break
        node = line.nodes[position]
        sources = node.all_input_nodes
        if not any(source in cuts or source in left for source in sources):
            continue
        if any(source in left for source in sources):
            left.add(node)
            continue
        state = line.ambient.states[position].key
        found = _joins(line, node, cuts, claimed, through)
        if isinstance(found, dict) and ambient not in (None, state):
            found = Reason("autocast or gradients are switched before it", (node.name,))
        if isinstance(found, Reason):
            stops.append(found)
            left.add(node)
            continue
        ambient = state
        cuts.update(found)
        inside.append(node)
        reach = max(reach, _last_read(line, found))
    return _trimmed(inside, cuts, shape_of(seed)[dim], tuple(stops))


def _last_read(line: Line, nodes: Iterable[fx.Node]) -> int:
    """Position of the last node that reads one of ``nodes``, -1 without any."""
    return max((line.position.get(user, -1) for node in nodes for user in node.users), default=-1)


def _joins(
    line: Line, node: fx.Node, cuts: Mapping[fx.Node, int], claimed: Set[fx.Node], through: Through
) -> dict[fx.Node, int] | Reason:
    """The dimensions that become known if ``node`` belongs to the region, or why it does not."""
    if node in claimed:
        return Reason("it belongs to another region", (node.name,))
    if not all(type(size) is int for size in shape_of(node)):
        return Reason("its sizes are known at run time only", (node.name,))
    found = through(node, cuts)
    if isinstance(found, Reason):
        return found
    roots = {root for ref in (node, *node.all_input_nodes) for root in line.aliases.roots[ref]}
    if roots & line.aliases.written:
        return Reason("its memory is written in place", (node.name,))
    if has_effect(node) and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return Reason("it has an effect", (node.name,))
    return found


def _trimmed(
    inside: list[fx.Node], cuts: Mapping[fx.Node, int], extent: int, stops: tuple[Reason, ...]
) -> Region:
    """Without views at the end: they may be taken of the whole as well."""
    kept = dict.fromkeys(inside)
    for node in reversed(inside):
        several = not isinstance(node.meta.get("val"), torch.Tensor)
        if (is_view(node) or several) and not any(user in kept for user in node.users):
            del kept[node]
    return Region(tuple(kept), cuts, extent, stops)
