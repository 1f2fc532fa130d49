"""Costs that plugins know better: a cost model with the operators of plugins priced by them.

A cost model knows the operators of torch and of graphopt; of others it knows what they read and write. Who
brings an operator says what its kernel takes (``graphopt_costs``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt import _torch
from graphopt.cost import CostModel, MemoryProfile, NodeCost
from graphopt.device import DeviceSpec
from graphopt.errors import PluginError
from graphopt.plugins.loading import GUARDED

if TYPE_CHECKING:
    import torch.fx as fx

    from graphopt.observed import ObservedStep, StepMemory
    from graphopt.plugins.host import PluginHost
    from graphopt.plugins.records import OperatorCost
    from graphopt.program import Program
    from graphopt.schedule import Schedule

__all__ = ["PricedByPlugins", "with_operator_costs"]


def with_operator_costs(cost: CostModel, host: PluginHost) -> CostModel:
    """``cost`` with the operators that plugins price priced by them; itself where there are none."""
    return PricedByPlugins(cost, host) if host.costs() else cost


class PricedByPlugins:
    """A cost model beside plugins' prices of operators. Bytes held are the model's own: what operators hold
    while they run is said beside them (``graphopt.operator_scratch``).

    A price that raises or makes no sense is recorded with its plugin, and the model's own stands for the
    operator from then on.
    """

    def __init__(self, base: CostModel, host: PluginHost) -> None:
        self.base = base
        self._host = host
        self._prices = dict(host.costs())
        self._of: dict[Any, OperatorCost | None] = {}

    @property
    def device(self) -> DeviceSpec:
        return self.base.device

    def node(self, node: fx.Node) -> NodeCost:
        own = self.base.node(node)
        if node.op != "call_function":
            return own
        if node.target not in self._of:
            self._of[node.target] = self._prices.get(_qualified(node.target))
        spec = self._of[node.target]
        if spec is None:
            return own
        try:
            with self._host.using("graphopt_costs", spec.name):
                found = spec.price(node, self.device)
            if wrong := _nonsense(found):
                raise PluginError(f"cost of operator {spec.name!r}: {wrong}")
        except GUARDED as error:
            self._of = {target: None if of is spec else of for target, of in self._of.items()}
            del self._prices[spec.name]
            self._host.blame("graphopt_costs", spec.name, error)
            return own
        return replace(found, workspace_bytes=own.workspace_bytes)

    def memory(self, step: Sequence[tuple[Program, Schedule]], *, base_bytes: int = 0) -> MemoryProfile:
        return self.base.memory(step, base_bytes=base_bytes)

    def observed(self, step: ObservedStep) -> StepMemory:
        return self.base.observed(step)


def _qualified(target: Any) -> str:
    """``"acme::gate"`` of the overload ``acme.gate.default``, ``""`` of what is no operator."""
    schema = _torch.schema_of(target)
    return "" if schema is None else str(schema.name)


def _nonsense(found: object) -> str:
    """What is wrong with a price, or ``""``."""
    if not isinstance(found, NodeCost):
        return f"expected a NodeCost, got {found!r}"
    numbers = {
        "flops": found.flops,
        "bytes_read": found.bytes_read,
        "bytes_written": found.bytes_written,
        "seconds": found.seconds,
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{name} is {value!r}: expected a number"
        if not math.isfinite(value) or value < 0:
            return f"{name} is {value}: expected a finite number that is not negative"
    if found.workspace_bytes:
        return "workspace_bytes are said with graphopt.operator_scratch.state_scratch"
    return ""
