"""What unrolling a region changes, by the cost model."""

from __future__ import annotations

from graphopt.candidate import CostDelta
from graphopt.cost import CostModel
from graphopt_passes.chunk.region import Region, bytes_of
from graphopt_passes.chunk.rows import is_view

__all__ = ["delta"]


def delta(region: Region, count: int, cost: CostModel) -> CostDelta:
    """Predicted change of the step: of the values inside one slice is alive instead of all, what enters and
    leaves is copied once; each operator is launched ``count`` times, in the forward and about twice in the
    backward."""
    launched = sum(not is_view(node) for node in region.nodes)
    copied = sum(map(bytes_of, (*region.entries, *region.exits)))
    device = cost.device
    seconds = 3 * (count - 1) * launched * device.launch_seconds
    seconds += 2 * copied * 2 / device.copy_bytes_per_second
    inner = region.inner_bytes
    return CostDelta(
        peak_bytes=-(inner - inner // count) + max(map(bytes_of, region.exits), default=0), seconds=seconds
    )
