"""What the kernel takes, from the metadata of a call alone."""

from __future__ import annotations

import torch
import torch.fx as fx

from graphopt import DeviceSpec
from graphopt.cost import NodeCost, known_size

__all__ = ["price"]


def price(node: fx.Node, device: DeviceSpec) -> NodeCost:
    """Bytes move once, and every element takes a product and a sum for each tap, on vector units."""
    result = node.meta["val"]
    taps = known_size(node.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]
    read = sum(_bytes(source.meta["val"]) for source in node.all_input_nodes)
    written = _bytes(result)
    flops = 2 * taps * known_size(result.numel())
    moving = (read + written) / device.copy_bytes_per_second
    computing = flops / device.vector_flops["float32"]
    return NodeCost(flops, read, written, max(moving, computing) + device.launch_seconds)


def _bytes(value: torch.Tensor) -> int:
    return known_size(value.numel()) * value.element_size()
