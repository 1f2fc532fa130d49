"""Seconds of a graph as Inductor is expected to run it: one price per kernel, not per operator."""

from __future__ import annotations

import torch.fx as fx

from graphopt import _torch
from graphopt.cost import CostModel
from graphopt.emit.fusion import Fused, Kernel
from graphopt.program import tensor_leaves

__all__ = ["fused_seconds", "loops_over"]


def fused_seconds(fused: Fused, cost: CostModel) -> float:
    """Predicted seconds of a graph fused by Inductor.

    A library call costs what the cost model says; a generated kernel the bytes that it reads and
    writes in memory at copy bandwidth, and a launch. What a GPU's registers do not hold is read again by each
    loop over the rows (``loops_over``).
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
        again = loops_over(kernel) if fused.device_type != "cpu" else {}
        times = {base.get(name, name): count for name, count in again.items()}
        moved = sum(_bytes(by_name[name]) * times.get(name, 1) for name in read if name in by_name)
        moved += sum(_bytes(by_name[name]) for name in kernel.members if name in alive)
        seconds += moved / device.copy_bytes_per_second + device.launch_seconds
    return seconds


def loops_over(kernel: Kernel) -> dict[str, int]:
    """How many loops over its rows read each input of a kernel that reduces rows which no program holds.

    A reduction is complete at the end of its loop, so what is computed from it waits for the next. A maximum
    and the sum of exponentials after it are one loop (Milakov and Gimelshein 2018, "Online normalizer
    calculation for softmax").
    """
    if kernel.reduced == 1 or (kernel.inner and kernel.reduced <= _torch.HELD):
        return {}
    reduced = kernel.reductions
    loop: dict[str, int] = {}
    reading: dict[str, set[int]] = {}
    for member in kernel.members:
        sources = kernel.sources[member]
        online = reduced.get(member) == "sum"
        loop[member] = max(
            (
                loop[source] + (source in reduced and not (online and reduced[source] == "amax"))
                for source in sources
                if source in loop
            ),
            default=0,
        )
        for source in sources:
            reading.setdefault(source, set()).add(loop[member])
    return {name: len(loops) for name, loops in reading.items() if name not in kernel.members}


def _bytes(node: fx.Node) -> int:
    return sum(
        _torch.hint(tensor.numel() * tensor.element_size()) for tensor in tensor_leaves(node.meta.get("val"))
    )
