"""Price a schedule as a fusing code generator will run it, not operator by operator."""

from __future__ import annotations

import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import FrontierPoint
from graphopt.cost import CostModel
from graphopt.emit.fused_memory import fused_live
from graphopt.emit.fused_time import fused_seconds
from graphopt.emit.fusion import fuse
from graphopt.program import Program, tensor_leaves
from graphopt.schedule import Schedule

__all__ = ["device_type", "fused_point"]


def fused_point(
    program: Program, schedule: Schedule, cost: CostModel, *, flops: int, label: str
) -> FrontierPoint:
    """A frontier point whose bytes are those of fused kernels and whose ``seconds`` are the whole
    program's, forward and backward (the caller takes differences)."""
    nodes = {node.name: node for node in program.graph.nodes}
    step = cost.device.allocation_granularity
    kind = device_type(program)
    inputs = {spec.node for spec in program.signature.inputs}
    tangents = {spec.node for spec in program.signature.by_role("tangent")}
    results = {spec.node for spec in program.signature.outputs if spec.role in ("output", "mutation")}
    gradients = {spec.node for spec in program.signature.outputs if spec.role == "gradient"}
    forward = [nodes[name] for name in schedule.forward if nodes[name].op == "call_function"]
    backward = [nodes[name] for name in schedule.backward if nodes[name].op == "call_function"]
    handed = [*sorted(results - inputs), *schedule.saved]
    retained = _bytes(nodes, handed, inputs - tangents, step)
    given = _bytes(nodes, sorted(results - inputs), inputs, step)
    arriving = _bytes(nodes, sorted(tangents), set(), step)
    ahead_of = fuse(forward, set(handed), device_type=kind)
    behind_of = fuse(backward, gradients, device_type=kind)
    ahead = [live for _, live in fused_live(ahead_of, granularity=step)]
    owned = {name for name in schedule.saved if name not in results} | tangents
    behind = [live for _, live in fused_live(behind_of, owned, granularity=step)]
    entry = retained + arriving
    left = _bytes(nodes, sorted(gradients), inputs - tangents, step)
    forward_seconds = fused_seconds(ahead_of, cost)
    backward_seconds = fused_seconds(behind_of, cost)
    return FrontierPoint(
        schedule,
        max([retained, *ahead]),
        max([entry, given + left, *(entry + live for live in behind)]),
        retained,
        left,
        forward_seconds + backward_seconds,
        flops,
        label,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
    )


def _bytes(nodes: dict[str, fx.Node], names: list[str], excluded: set[str], step: int) -> int:
    """Rounded bytes of the distinct storages behind ``names``, those of ``excluded`` left out."""

    def storages(name: str) -> dict[int, int]:
        value = nodes[name].meta.get("val")
        return {
            _torch.storage_key(t): _torch.hint(t.untyped_storage().nbytes()) for t in tensor_leaves(value)
        }

    known = {key for name in excluded for key in storages(name)}
    found: dict[int, int] = {}
    for name in names:
        found.update(storages(name))
    return sum(-(-size // step) * step for key, size in found.items() if key not in known)


def device_type(program: Program) -> str:
    """Where a program runs: ``"cpu"``, ``"cuda"``."""
    kinds = [t.device.type for node in program.graph.nodes for t in tensor_leaves(node.meta.get("val"))]
    return next((kind for kind in kinds if kind != "cpu"), "cpu")
