"""What unrolling a region changes, by the cost model."""

from __future__ import annotations

from graphopt.candidate import CostDelta
from graphopt.capture.structure import is_trained_input
from graphopt.cost import CostModel
from graphopt_passes.chunk.region import Region, bytes_of
from graphopt_passes.chunk.rows import is_view

__all__ = ["delta"]


def delta(region: Region, count: int, cost: CostModel, mode: str) -> CostDelta:
    """Predicted change of the step: of the values inside one slice is alive instead of all, what enters and
    leaves is copied once; each operator is launched ``count`` times, in the forward and about twice in the
    backward, which also adds each slice's gradients of the weights to those of the slices before."""
    trains = mode == "train"
    launched = sum(not is_view(node) for node in region.nodes)
    moved = 2 * (1 + trains) * sum(map(bytes_of, (*region.entries, *region.exits)))
    if trains:
        weights = {w for node in region.nodes for w in node.all_input_nodes if is_trained_input(w)}
        moved += 3 * (count - 1) * sum(map(bytes_of, weights))
    device = cost.device
    seconds = (1 + 2 * trains) * (count - 1) * launched * device.launch_seconds
    seconds += moved / device.copy_bytes_per_second
    inner = region.inner_bytes
    return CostDelta(
        peak_bytes=-(inner - inner // count) + max(map(bytes_of, region.exits), default=0), seconds=seconds
    )
