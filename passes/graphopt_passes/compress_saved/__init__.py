"""compress-saved: hold what the backward needs of a value, in as few bytes as that takes, to the bit.

Before::

    forward:   %r = aten.relu(%x) : f32[N]                                   saves %r, 4 N bytes
    backward:  %d = aten.threshold_backward(%g, %r, 0)

After::

    forward:   %r = aten.relu(%x)
               %m = aten.le(%r, 0) : b8[N]
               %p = graphopt.pack_bits(%m) : u8[N / 8]                       saves %p, N / 8 bytes
    backward:  %u = graphopt.unpack_bits(%p, ...) : b8[N]
               %d = aten.masked_fill(%g, %u, 0)

===========  =====================================================  ==========================
rule         holds                                                  instead of
===========  =====================================================  ==========================
bits         bits                                                   booleans
narrow       the smallest integers that hold the proven range       int64, int32
condition    bits of a condition, or nothing where only the shape   a value that nobody reads
             is asked for                                           otherwise
===========  =====================================================  ==========================

The other half of the choice is ``insert-checkpoints``'s: it sees packing and unpacking as operators and
weighs them against keeping and computing again. The candidates of a program are an alternative to it, so
a plan never has to pack. (Jain et al. 2018, "Gist", hold ReLU's masks and pooling's positions so.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphopt.candidate import Declined, NearMiss, Reason
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.compress_saved.packing import Packing, packing_of
from graphopt_passes.compress_saved.price import candidate_of
from graphopt_passes.compress_saved.saved import SavedValues

__all__ = ["CompressSaved"]


@dataclass(frozen=True)
class CompressSaved(Pass):
    """``least_bytes``: values smaller than that are left as they are; packing one takes about twenty
    launches of kernels."""

    name: ClassVar[str] = "compress-saved"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "hold masks as bits and indices in few bytes for the backward, without loss"
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are chosen for what is there to be saved",
        "quantize-saved": "what can be held without loss is not to be rounded",
    }

    least_bytes: int = 16384

    def __post_init__(self) -> None:
        if not isinstance(self.least_bytes, int) or self.least_bytes < 0:
            raise PassError(
                f"compress-saved: least_bytes={self.least_bytes!r}: expected a whole number, 0 or more"
            )

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode != "train":
            return
        if program.has_symbolic_sizes:
            # Asking how large a value is would bind the program to the present sizes.
            why = "sizes are symbolic: packed values have a fixed length"
            yield Declined(f"{self.name}@{program.name}", why)
            return
        values = SavedValues(program)
        packings: list[Packing] = []
        for value in values:
            if value.bytes < self.least_bytes:
                continue
            found = packing_of(value, values)
            if isinstance(found, Reason):
                yield NearMiss(self.name, value.node.name, 1, 2, found)
            elif found is not None:
                packings.append(found)
        for packing in packings:
            yield candidate_of(self.name, packing, values, ctx)
