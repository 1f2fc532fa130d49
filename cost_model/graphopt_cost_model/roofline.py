"""The roofline cost model: a call takes as long as its slowest resource, and a launch.

Time of a call = max(FLOPs / matmul rate of its dtype, elements / vector rate, bytes / bandwidth)
+ launch, or the sum of that over its phases. Bytes move at the copy bandwidth where reads and writes
balance, and what is read beyond that at the read bandwidth. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx

from graphopt.cost import MemoryProfile, NodeCost
from graphopt.device import DeviceSpec
from graphopt_cost_model.call import Call, call_of
from graphopt_cost_model.flops import Work, work
from graphopt_cost_model.liveness import profile
from graphopt_cost_model.observed_liveness import SimulatedHalves, SimulatedStep
from graphopt_cost_model.phases import phases_of
from graphopt_cost_model.traffic import Traffic, traffic_of
from graphopt_cost_model.workspace import WorkspaceProbe

if TYPE_CHECKING:
    from graphopt.observed import ObservedStep
    from graphopt.program import Program
    from graphopt.schedule import Schedule

__all__ = ["RooflineCostModel"]

_FREE = NodeCost(0, 0, 0, 0.0)
_KNOWN = "_graphopt_costs"

_NodeCosts = dict[fx.Node, tuple[list[object], NodeCost]]
"""The cost of each node, with all that it was priced by."""


class RooflineCostModel:
    """Prices nodes and steps for one device; implements ``graphopt.cost.CostModel``.

    ``NodeCost.flops`` counts matrix products, convolutions, attention, recurrent layers and
    Fourier transforms; everything else is priced by its bytes (``graphopt_cost_model.flops``).
    ``workspaces`` says whether transients inside kernels are measured; by default they are where
    that is possible, on the CPU. Costs are memoised by call, so equal nodes are priced once.
    """

    def __init__(self, device: DeviceSpec, *, workspaces: bool | None = None) -> None:
        self._device = device
        measured = device.kind == "cpu" if workspaces is None else workspaces
        self.workspace = WorkspaceProbe() if measured else None
        self._float32 = "float32" if torch.get_float32_matmul_precision() == "highest" else "tfloat32"
        self._costs: dict[Call, NodeCost] = {}

    @property
    def device(self) -> DeviceSpec:
        return self._device

    @property
    def unprobed(self) -> Mapping[str, str]:
        """Operators whose workspace could not be measured and counts as 0, with the reason."""
        return self.workspace.unprobed if self.workspace else {}

    def node(self, node: fx.Node) -> NodeCost:
        """Cost of one ATen node, from its metadata; nothing for what is no call."""
        if node.op != "call_function":
            return _FREE
        # To read a call takes much longer than to see that it is the one of before.
        made_from = [node.target, node.args, node.kwargs, node.meta.get("val")]
        made_from += [source.meta.get("val") for source in node.all_input_nodes]
        costs = self._costs_in(node.graph)
        known = costs.get(node)
        if known is not None and len(known[0]) == len(made_from) and all(map(is_, known[0], made_from)):
            return known[1]
        call = call_of(node)
        cost = self._costs.get(call)
        if cost is None:
            cost = self._costs[call] = self.price(call)
        costs[node] = made_from, cost
        return cost

    def _costs_in(self, graph: fx.Graph) -> _NodeCosts:
        """Costs of the nodes of a graph, which hold its nodes and so have to live no longer than it does."""
        models: WeakKeyDictionary[RooflineCostModel, _NodeCosts] | None = getattr(graph, _KNOWN, None)
        if models is None:
            models = WeakKeyDictionary()
            setattr(graph, _KNOWN, models)
        return models.setdefault(self, {})

    def price(self, call: Call) -> NodeCost:
        """Cost of one call."""
        if call.is_view or not (call.inputs or call.outputs):
            return _FREE
        amount, moved = work(call), traffic_of(call)
        transient = self.workspace.of(call) if self.workspace else 0
        phases = [
            (phase.dtype, Work(phase.flops, phase.elements), Traffic(phase.read, phase.written))
            for phase in phases_of(call)
        ] or [(_compute_dtype(call), amount, moved)]
        seconds = sum(self._seconds(*phase) for phase in phases)
        return NodeCost(amount.flops, moved.read, moved.written, seconds, transient)

    def memory(self, step: Sequence[tuple[Program, Schedule]], *, base_bytes: int = 0) -> MemoryProfile:
        """Exact op-by-op liveness of a step, transients inside kernels included."""
        return profile(
            step,
            base_bytes=base_bytes,
            granularity=self._device.allocation_granularity,
            workspace=(lambda node: self.node(node).workspace_bytes) if self.workspace else None,
        )

    def observed(self, step: ObservedStep) -> SimulatedStep:
        """Exact op-by-op liveness of a step that was seen to run, whatever its programs run as."""
        halves = SimulatedHalves(
            granularity=self._device.allocation_granularity,
            workspace=(lambda node: self.node(node).workspace_bytes) if self.workspace else None,
        )
        return SimulatedStep(step, halves)

    def _seconds(self, dtype: str, amount: Work, moved: Traffic) -> float:
        vector = _rate(self._device.vector_flops, dtype)
        products = vector if amount.on_vectors else self._matmul_rate(dtype)
        balanced = min(moved.read, moved.written)
        excess = self._device.read_bytes_per_second
        if moved.written > moved.read:
            excess = self._device.copy_bytes_per_second
        bandwidth = 2 * balanced / self._device.copy_bytes_per_second
        bandwidth += (moved.read + moved.written - 2 * balanced) / excess
        return max(amount.flops / products, amount.elements / vector, bandwidth) + self._device.launch_seconds

    def _matmul_rate(self, dtype: str) -> float:
        """float32 products run at the tfloat32 rate where the device has one and torch may use it."""
        rates = self._device.matmul_flops
        if dtype == "float32" and self._float32 in rates:
            return rates[self._float32]
        return _rate(rates, dtype)


def _compute_dtype(call: Call) -> str:
    """The dtype that the call computes in: its first tensor of numbers, indices only failing that."""
    specs = (*call.inputs, *call.outputs)
    numbers = (spec for spec in specs if spec.dtype.is_floating_point or spec.dtype.is_complex)
    spec = next(numbers, specs[0])
    return str(spec.dtype).removeprefix("torch.")


def _rate(rates: Mapping[str, float], dtype: str) -> float:
    return rates[dtype] if dtype in rates else rates["float32"]
