"""The cost model ``serial``: nothing overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from graphopt import DeviceSpec, Program, Schedule
from graphopt.cost import CostModel, MemoryProfile, NodeCost
from graphopt.plugins import default_host

if TYPE_CHECKING:
    from graphopt.observed import ObservedStep, StepMemory

__all__ = ["SerialCostModel"]


class SerialCostModel:
    """Bytes, FLOPs and the memory of steps are the roofline model's; seconds are those of the FLOPs, of the
    bytes and of the launch, one after the other."""

    def __init__(self, device: DeviceSpec) -> None:
        self._roofline: CostModel = default_host().cost_model("roofline").build(device)

    @property
    def device(self) -> DeviceSpec:
        return self._roofline.device

    def node(self, node: fx.Node) -> NodeCost:
        found = self._roofline.node(node)
        if not found.seconds:
            return found
        rates = self.device.matmul_flops
        computing = found.flops / rates.get(_dtype(node), rates["float32"])
        moving = (found.bytes_read + found.bytes_written) / self.device.copy_bytes_per_second
        return replace(found, seconds=computing + moving + self.device.launch_seconds)

    def memory(self, step: Sequence[tuple[Program, Schedule]], *, base_bytes: int = 0) -> MemoryProfile:
        return self._roofline.memory(step, base_bytes=base_bytes)

    def observed(self, step: ObservedStep) -> StepMemory:
        return self._roofline.observed(step)


def _dtype(node: fx.Node) -> str:
    """The dtype that a call computes in, as devices name it."""
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "float32"
