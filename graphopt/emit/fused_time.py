"""Seconds of a graph as Inductor is expected to run it: one price per kernel, not per operator."""

from __future__ import annotations

import torch.fx as fx

from graphopt import _torch
from graphopt.cost import CostModel
from graphopt.emit.fusion import Fused
from graphopt.program import tensor_leaves

__all__ = ["fused_seconds"]


def fused_seconds(fused: Fused, cost: CostModel) -> float:
    """Predicted seconds of a graph fused by Inductor.

    A library call costs what the cost model says; a generated kernel the bytes that it reads and
    writes in memory at copy bandwidth, and a launch.
    """
    kernels, alive, base = fused.kernels, fused.alive, fused.bases
    by_name = {node.name: node for node in fused.nodes}
    for node in fused.nodes:
        for source in node.all_input_nodes:
            by_name.setdefault(source.name, source)
    device = cost.device
    seconds = 0.0
    for kernel in kernels:
        if kernel.library:
            seconds += sum(cost.node(by_name[name]).seconds for name in kernel.members)
            continue
        read = {base.get(name, name) for name in kernel.reads} - set(kernel.members)
        moved = sum(_bytes(by_name[name]) for name in read if name in by_name)
        moved += sum(_bytes(by_name[name]) for name in kernel.members if name in alive)
        seconds += moved / device.copy_bytes_per_second + device.launch_seconds
    return seconds


def _bytes(node: fx.Node) -> int:
    return sum(
        _torch.hint(tensor.numel() * tensor.element_size()) for tensor in tensor_leaves(node.meta.get("val"))
    )
