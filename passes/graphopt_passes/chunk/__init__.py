"""chunk: compute a region whose values inside are large slice by slice, so that one slice is alive at a time.

Before::

    %2 = linear(%x, %w1) : f32[8, 512, 512]
    %3 = gelu(%2)
    %4 = linear(%3, %w2) : f32[8, 512, 128]

After, in slices along the batch (``axis`` "batch"), or along a sequence or an image ("positions")::

    %s = split_with_sizes(%x, [4, 4])
    %20 = linear(%s[0], %w1)   %30 = gelu(%20)   %40 = linear(%30, %w2)
    %21 = linear(%s[1], %w1)   %31 = gelu(%21)   %41 = linear(%31, %w2)
    %4 = cat([%40, %41])

Regions are found by dataflow (``region``): operators that treat the slices apart (``rows``), as many in a row
as there are. That alone holds as much as before; with insert-checkpoints the backward runs one slice again,
goes through it and lets it go before the next. So each number of slices is an alternative, which the planner
weighs. A weight's gradient becomes a sum over slices, rounded in another order.

Sources: StreamBP (Luo et al. 2025) for token-wise segments, sequence-chunked MLPs as in Liu and Abbeel 2023
(Blockwise Parallel Transformer); along the batch it is gradient accumulation within one program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphopt.candidate import Candidate, Declined, NearMiss, Reason
from graphopt.capture.structure import line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.chunk.price import delta
from graphopt_passes.chunk.region import AXES, Place, Region, regions
from graphopt_passes.chunk.rewrite import unroll

__all__ = ["Chunk"]


@dataclass(frozen=True)
class Chunk(Pass):
    """Offers to compute regions in so many ``chunks``.

    The largest value inside keeps ``least_elements`` or more in a slice: with fewer, launching an operator
    takes longer than running it. The values inside are ``ratio`` times what enters and leaves or more.
    ``most_nodes`` bounds the calls that a region becomes.
    """

    chunks: tuple[int, ...] = (2, 4, 8, 16)
    least_elements: int = 65536
    ratio: float = 2.0
    most_nodes: int = 4000

    name: ClassVar[str] = "chunk"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "compute regions in slices of rows, so that their large values are never whole"
    after: ClassVar[dict[str, str]] = {
        "normalize": "calls that do nothing hide which rows are read",
        "linear-cross-entropy": "it takes the product with the loss; what is left of the region is cut",
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if program.has_symbolic_sizes:
            # Asking how large a value is would bind the program to the present sizes.
            yield Declined(f"{self.name}@{program.name}", "sizes are symbolic: slices have fixed lengths")
            return
        line = line_of(program.graph)
        for axis in AXES:
            for region in regions(program, line, axis):
                counts = self._counts(region)
                refusal = self._refusal(region, counts)
                if refusal is None:
                    yield from self._candidates(region, axis, counts, ctx)
                elif region.inner_bytes:
                    yield self._near_miss(region, refusal)

    def _counts(self, region: Region) -> list[int]:
        return [
            count
            for count in self.chunks
            if 1 < count <= region.extent
            and region.largest >= count * self.least_elements
            and len(region.nodes) * count <= self.most_nodes
        ]

    def _refusal(self, region: Region, counts: list[int]) -> Reason | None:
        first = (region.nodes[0].name,)
        if region.inner_bytes < self.ratio * region.boundary_bytes:
            share = region.inner_bytes / region.boundary_bytes
            ends = f": it ends where {region.stops[0].text}" if region.stops else ""
            return Reason(
                f"its values take {share:.1f} times what enters and leaves, less than {self.ratio:g}{ends}",
                (*first, *(region.stops[0].nodes if region.stops else ())),
            )
        if not counts:
            least = min(self.chunks, default=0) * self.least_elements
            if region.largest < least:
                return Reason(
                    f"its largest value has {region.largest} elements: cutting takes {least}", first
                )
            if len(region.nodes) * min(self.chunks, default=0) > self.most_nodes:
                return Reason(f"unrolled it would be more than {self.most_nodes} calls", first)
            return Reason(f"there are {region.extent} slices at most", first)
        return None

    def _near_miss(self, region: Region, reason: Reason) -> NearMiss:
        size = len(region.nodes)
        return NearMiss(self.name, region.nodes[0].name, size, size + len(region.stops), reason)

    def _candidates(
        self, region: Region, axis: str, counts: list[int], ctx: PassContext
    ) -> Iterable[Candidate]:
        start, place = region.nodes[0].name, Place.of(region)
        ids = {count: f"{self.name}@{start}/{axis}/{count}" for count in counts}
        for count, id_ in ids.items():
            yield Candidate(
                id_,
                self.name,
                tuple(node.name for node in region.nodes),
                delta(region, count, ctx.cost, ctx.mode),
                _writing(place, axis, count),
                exactness="reassociated",
                conflicts=tuple(other for other in ids.values() if other != id_),
                alternative=True,
                family=f"{self.name}@*/{axis}/{count}",
            )


def _writing(place: Place, axis: str, count: int) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        edit.rule = f"{axis}/{count}"
        unroll(edit, place.found(edit), count)

    return apply
