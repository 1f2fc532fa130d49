"""Candidates out of packings: what each frees and what moving the bytes takes on the device."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.candidate import Candidate, CostDelta
from graphopt.edit import Edit
from graphopt.passes import PassContext
from graphopt_passes.compress_saved.packing import Packing
from graphopt_passes.compress_saved.saved import SavedValues

__all__ = ["candidate_of"]


def candidate_of(pass_id: str, packing: Packing, values: SavedValues, ctx: PassContext) -> Candidate:
    """One packing as an alternative for the planner.

    Seconds are those of reading and writing every byte once more and of the launches that takes; the
    planner prices the packed program anew, operator by operator.
    """
    device = ctx.cost.device
    moved = packing.traffic / device.copy_bytes_per_second
    launched = packing.launches * device.launch_seconds if ctx.emit == "eager" else 0.0
    return Candidate(
        f"{pass_id}@{packing.value.node.name}/{packing.rule}",
        pass_id,
        (packing.value.node.name,),
        CostDelta(packing.packed_bytes - packing.value.bytes, 0, moved + launched, packing.error),
        _Packed(packing, values, opaque=ctx.emit == "eager"),
        exactness="lossy" if packing.error else "exact",
        metric=packing.metric,
        alternative=True,
    )


@dataclass(frozen=True)
class _Packed:
    """Applies one packing."""

    packing: Packing
    values: SavedValues
    opaque: bool

    def __call__(self, edit: Edit) -> None:
        edit.rule = self.packing.rule
        self.packing.apply(edit, self.values, opaque=self.opaque)
