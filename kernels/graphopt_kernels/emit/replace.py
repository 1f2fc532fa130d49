"""Emitted kernels inside of programs that Inductor compiles: for groups that are faster so, and known to be.

Groups are those of ``groups.grouped``. One is kept where

1. the graph is predicted to be faster with it, by the cost model: without the group's operators, with what
   the kernel reads and writes in memory, and with the seconds of the kernel. That Inductor would fuse the
   operators with others counts against it; and
2. it was measured to be faster than Inductor's kernels for the same operators on the present device, under
   the present versions (``graphopt tune TARGET``, ``tuning.groups``).

Where nothing was measured on a device, nothing is searched and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.fx as fx

from graphopt.cost import CostModel
from graphopt.emit.fused_time import fused_seconds
from graphopt.emit.fusion import fuse
from graphopt.emit.replacing import Group
from graphopt.group_record import GroupRecord
from graphopt_kernels.emit.attention_choice import emitted_attention
from graphopt_kernels.emit.groups import grouped
from graphopt_kernels.emit.kernel_file import Kernel
from graphopt_kernels.emit.order import is_free
from graphopt_kernels.emit.product_choice import Prices
from graphopt_kernels.emit.running import known
from graphopt_kernels.tuning.groups import EMITTED, GROUPS, GroupProblem, anything_measured, was_measured
from graphopt_kernels.tuning.lookup import is_asking

__all__ = ["groups_for", "propose"]

GAIN = 0.02
"""Of a kernel's seconds: what a replacement has to be predicted to save. What is less is rounding."""

Answer = Callable[[GroupProblem], tuple[bool, bool]]
"""Whether a group was measured, and whether it was faster."""


def propose(gm: fx.GraphModule, cost: CostModel) -> list[Group]:
    """The groups of a graph that is about to be compiled, kept or not (``ReplacementSpec``)."""
    devices = (_device(node) for node in gm.graph.nodes)
    device = next((found for found in devices if found is not None and found.type == "cuda"), None)
    if device is None or cost.device.kind != "cuda":
        return []
    if not is_asking() and not anything_measured(device):
        return []

    def answer(problem: GroupProblem) -> tuple[bool, bool]:
        return was_measured(problem, device), GROUPS(problem, device).by == EMITTED

    return groups_for(gm, cost, answer)


def groups_for(gm: fx.GraphModule, cost: CostModel, answer: Answer) -> list[Group]:
    """The groups of a graph for which a kernel is predicted to be faster or slower, and what ``answer`` says
    of those that are faster."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    results = {node.name for node in output.all_input_nodes}
    prices = Prices(cost.device)
    apart = fused_seconds(fuse(nodes, results, device_type="cuda"), cost)
    found = []
    for kernel in grouped(gm.graph, prices=prices).kernels:
        if not kernel.inputs:
            continue
        inside = _only_inside(kernel)
        rest = [node for node in nodes if node not in inside]
        handed = results | {node.name for node in kernel.inputs}
        own = _seconds(kernel, prices)
        together = fused_seconds(fuse(rest, handed, device_type="cuda"), cost) + own
        kept, reason = False, "predicted to be no faster than Inductor's kernels"
        if apart - together > GAIN * own:
            measured, faster = answer(GroupProblem(known(kernel.file)))
            kept = faster
            if faster:
                reason = "measured faster"
            elif measured:
                reason = "measured: Inductor's kernels are as fast"
            else:
                reason = "not measured on this device: graphopt tune"
        nodes_of_it = tuple(node for node in kernel.nodes if node in inside)
        names = (getattr(node.target, "_opname", "") for node in nodes_of_it)
        file = kernel.file.name
        record = GroupRecord(file, tuple(n for n in names if n), kernel.layers, kept, reason, apart, together)
        call = torch.ops.graphopt.emitted_kernel.default
        found.append(Group(nodes_of_it, kernel.outputs, call, (file, list(kernel.inputs)), record))
    return found


def _only_inside(kernel: Kernel) -> set[fx.Node]:
    """Nodes of a group that nothing else needs: views that others read as well stay outside, too."""
    inside = {node for node in kernel.nodes if not is_free(node)}
    for node in reversed(kernel.nodes):
        if is_free(node) and all(user in inside for user in node.users):
            inside.add(node)
    return inside


def _seconds(kernel: Kernel, prices: Prices) -> float:
    if kernel.file.attends:
        return emitted_attention(prices, kernel.file)
    return prices.emitted(kernel.file) if kernel.file.tiling is not None else prices.moved(kernel.file.bytes)


def _device(node: fx.Node) -> torch.device | None:
    value = node.meta.get("val")
    leaves: Sequence[object] = value if isinstance(value, (tuple, list)) else [value]
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
