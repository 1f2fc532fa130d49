"""Seconds of a graph as Inductor is expected to run it: one price per kernel, not per operator."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.fx as fx

from graphopt import _torch
from graphopt.cost import CostModel
from graphopt.emit.fusion import bases, fuse, in_memory
from graphopt.program import tensor_leaves

__all__ = ["fused_seconds"]


def fused_seconds(
    nodes: Sequence[fx.Node], outputs: Collection[str], cost: CostModel, *, device_type: str = "cpu"
) -> float:
    """Predicted seconds of ``nodes`` (call nodes in execution order), fused by Inductor.

    A library call costs what the cost model says; a generated kernel the bytes that it reads and
    writes in memory at copy bandwidth, and a launch.
    """
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        for source in node.all_input_nodes:
            by_name.setdefault(source.name, source)
    kernels = fuse(nodes, outputs, device_type=device_type)
    alive = in_memory(nodes, outputs, kernels)
    base = bases(nodes)
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
