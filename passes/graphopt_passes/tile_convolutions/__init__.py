"""tile-convolutions: compute the first layers of a convolutional network tile by tile.

Before, the largest values of a network, those of its first layers, are whole::

    %2 = conv2d(%x, %w1) : f32[1, 64, 1024, 1024]
    %3 = relu(%2)
    %4 = max_pool2d(%3) : f32[1, 64, 512, 512]

After, in bands of rows, each with what its windows reach over (the halo), one is alive at a time::

    %20 = conv2d(%x[:, :, 0:514], %w1)    %30 = relu(%20)   %40 = max_pool2d(%30)
    %21 = conv2d(%x[:, :, 510:1024], %w1) %31 = relu(%21)   %41 = max_pool2d(%31)
    %4 = cat([%40, %41], 2)

What lies in a halo is computed once for each tile that needs it. The deeper a prefix, the wider its
halos; so of the prefixes that end in one value the one is offered after which least is held. Tiles are
bands of rows: of all shapes with as many tiles they need the fewest calls, and no corners.

Operators that look at a whole image (batch norms in training, group norms, attention) end a prefix.
Along the batch ``chunk`` cuts convolutions without any halo.

Sources: Lin et al. 2021 (MCUNetV2, patch-based inference); Alwani et al. 2016 (fused-layer CNN accelerators).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, Declined, NearMiss, Reason
from graphopt.capture.structure import line_of
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.chunk.region import Place, Region, bytes_of, grow
from graphopt_passes.chunk.rows import is_view, shape_of
from graphopt_passes.tile_convolutions.rewrite import tile
from graphopt_passes.tile_convolutions.tiling import Prefix, prefixes
from graphopt_passes.tile_convolutions.windows import ROWS, Window, through, window_of

__all__ = ["TileConvolutions"]


@dataclass(frozen=True)
class TileConvolutions(Pass):
    """Offers to compute a prefix in so many ``tiles``.

    At most ``again`` of its time is spent on rows that are computed more than once. The largest value inside
    keeps ``least_elements`` or more in a tile.
    """

    tiles: tuple[int, ...] = (2, 4, 8, 16)
    again: float = 0.5
    least_elements: int = 65536

    name: ClassVar[str] = "tile-convolutions"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "compute the first layers of convolutional networks in overlapping tiles"
    after: ClassVar[dict[str, str]] = {"normalize": "calls that do nothing hide which rows are read"}

    def __post_init__(self) -> None:
        if not self.again >= 0.0:
            raise PassError(f"tile-convolutions: again={self.again!r} is no share of time, 0 or more")

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if program.has_symbolic_sizes:
            yield Declined(f"{self.name}@{program.name}", "sizes are symbolic: tiles have fixed heights")
            return
        for region in _regions(program):
            yield from self._offered(program, region, ctx)

    def _offered(self, program: Program, region: Region, ctx: PassContext) -> Iterator[Proposal]:
        first = region.nodes[0].name
        largest = max((_elements(node) for node in region.nodes), default=0)
        counts = [count for count in self.tiles if count > 1 and largest >= count * self.least_elements]
        if not counts:
            least = min(self.tiles, default=0) * self.least_elements
            reason = Reason(f"its largest value has {largest} elements: tiling takes {least}", (first,))
            yield self._near_miss(region, reason)
            return
        candidates = list(self._candidates(program, region, counts, ctx))
        if not candidates:
            ends = f": it ends where {region.stops[0].text}" if region.stops else ""
            reason = Reason(
                f"no prefix of it holds less in tiles at {100 * self.again:.0f} % more time or less{ends}",
                (first, *(region.stops[0].nodes if region.stops else ())),
            )
            yield self._near_miss(region, reason)
        yield from candidates

    def _near_miss(self, region: Region, reason: Reason) -> NearMiss:
        size = len(region.nodes)
        return NearMiss(self.name, region.nodes[0].name, size, size + len(region.stops), reason)

    def _candidates(
        self, program: Program, region: Region, counts: list[int], ctx: PassContext
    ) -> Iterator[Candidate]:
        cost, training = ctx.cost, ctx.mode == "train"
        seconds = {node: cost.node(node).seconds for node in region.nodes}
        known = list(prefixes(region))
        after = _held_after(program, training=training)
        chosen: list[tuple[int, Prefix, int, float]] = []
        for count in counts:
            best: tuple[int, Prefix, int, float] | None = None
            for prefix in known:
                if not _is_worth(prefix, count):
                    continue
                again = prefix.again(count, seconds.__getitem__)
                if again > self.again:
                    # Longer prefixes have wider halos.
                    break
                ends = bytes_of(prefix.result)
                held = max(ends + prefix.held(count, training=training), after[prefix.result])
                if best is None or held < best[0]:
                    whole = max(ends + prefix.held(1, training=training), after[prefix.result])
                    best = held, prefix, held - whole, again
            if best is not None and best[2] < 0:
                chosen.append((count, *best[1:]))
        ids = [f"{self.name}@{prefix.result.name}/{count}" for count, prefix, _, _ in chosen]
        for id_, (count, prefix, freed, again) in zip(ids, chosen, strict=True):
            calls = sum(not is_view(node) for node in prefix.nodes)
            time = again * sum(seconds[node] for node in prefix.nodes)
            time += (count - 1) * calls * cost.device.launch_seconds
            time += 2 * bytes_of(prefix.result) / cost.device.copy_bytes_per_second
            yield Candidate(
                id_,
                self.name,
                tuple(node.name for node in prefix.nodes),
                CostDelta(peak_bytes=freed, seconds=time),
                _writing(prefix, count),
                exactness="reassociated",
                conflicts=tuple(other for other in ids if other != id_),
                alternative=True,
            )


def _regions(program: Program) -> Iterator[Region]:
    """What lies behind images, with a window in it; no two share a node."""
    windows = [node for node in program.nodes() if isinstance(window_of(node), Window)]
    if not windows:
        return
    line = line_of(program.graph)
    ranks = {len(shape_of(node)) for node in windows}
    end = max(line.position.get(node, -1) for node in windows)
    roles = {spec.node: spec.role for spec in program.signature.inputs}
    claimed: set[fx.Node] = set()
    for seed in program.graph.nodes:
        is_input = seed.op == "placeholder" and roles.get(seed.name) in ("input", "activation")
        if not is_input and seed not in line.position:
            continue
        if line.position.get(seed, -1) >= end:
            break
        if seed in claimed or is_view(seed) or not _is_image(seed) or len(shape_of(seed)) not in ranks:
            continue
        region = grow(line, seed, ROWS, claimed, through)
        if any(isinstance(window_of(node), Window) for node in region.nodes):
            claimed.update(region.nodes)
            yield region


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.is_floating_point()
        and value.dim() > ROWS
        and all(type(size) is int for size in value.shape)
        and value.shape[ROWS] > 1
    )


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _is_worth(prefix: Prefix, count: int) -> bool:
    """Whether a prefix slides windows, and every tile has rows of its own in every value."""
    if count > prefix.size(prefix.result):
        return False
    slides = any(prefix.window(node) is not None for node in prefix.nodes)
    return slides and all(stop > start for rows in prefix.tiles(count) for start, stop in rows.values())


def _held_after(program: Program, *, training: bool) -> dict[fx.Node, int]:
    """For every node the most that is held from then on: in training all that is made, else what is alive
    at a time, as if a node's operands went with their last reader."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    last = {source: k for k, node in enumerate(nodes) for source in node.all_input_nodes}
    sizes = {node: 0 if is_view(node) else bytes_of(node) for node in nodes}
    alive, levels = 0, []
    ends: dict[int, int] = {}
    for k, node in enumerate(nodes):
        alive += sizes[node]
        levels.append(alive)
        until = last.get(node, len(nodes))
        ends[until] = ends.get(until, 0) + sizes[node]
        alive -= ends.pop(k, 0)
    found, most, made = {}, 0, 0
    for node, level in zip(reversed(nodes), reversed(levels), strict=True):
        most, made = max(most, level), made + sizes[node]
        found[node] = made if training else most
    return found


def _writing(prefix: Prefix, count: int) -> Callable[[Edit], None]:
    place = Place.of(prefix.region)

    def apply(edit: Edit) -> None:
        edit.rule = f"rows/{count}"
        region = place.found(edit)
        tile(edit, Prefix(region, region.nodes[-1]), count)

    return apply
