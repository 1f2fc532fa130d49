"""Compile with Inductor, the partition being ours, the memory of the result known before it runs."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import NearMiss
from graphopt.cost import CostModel
from graphopt.emit import kernel_order
from graphopt.emit.emitter import NONE, Gradients, Inference, Partition
from graphopt.emit.fusion import OPERATIONS_LIMIT
from graphopt.emit.held_products import Slot, add_to_held, holding, settled
from graphopt.emit.kernel_order import least_memory_order
from graphopt.emit.lowered import LoweredCompiler, LoweredMemory
from graphopt.emit.replacing import Replacing
from graphopt.group_record import GroupRecord

__all__ = ["InductorEmitter", "JointSeen"]


class JointSeen(Exception):
    """Raised by a partition that only wanted to see the joint graph; compilation ends there."""


@functools.cache
def _cache_key() -> str:
    """Names what graphopt changes of Inductor, in the keys of its graph cache: the sources of the changes."""
    sources = "".join(map(inspect.getsource, (_torch, kernel_order)))
    return f"graphopt {hashlib.sha256(sources.encode()).hexdigest()}"


class InductorEmitter:
    """Inductor for both halves. ``records`` holds the memory of each graph compiled last, ``groups`` what
    ``replacing`` said of groups of operators of all graphs.

    Gradients of weights are added to ``.grad`` by the products that make them (``held_products``);
    ``near_misses`` says which are not, and why. ``cost`` predicts what is faster.
    """

    name = "inductor"
    fuses = True
    by_segments = True

    def __init__(
        self, granularity: int = 1, replacing: Replacing | None = None, cost: CostModel | None = None
    ) -> None:
        self.granularity = granularity
        self._cost = cost
        self.near_misses: list[NearMiss] = []
        self.records: list[LoweredMemory] = []
        self.groups: list[GroupRecord] = []
        self._replacing = replacing

    def compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        partition: Partition,
        inference: Inference,
        gradients: Gradients = NONE,
    ) -> Callable[..., Any]:
        examples = [x if k in gradients.parameters else None for k, x in enumerate(inputs)]
        compiler = LoweredCompiler(granularity=self.granularity)
        seen: list[fx.GraphModule] = []

        def inner(graph: fx.GraphModule, graph_inputs: Sequence[Any], **kwargs: Any) -> Any:
            if kwargs.get("is_inference"):
                seen.append(graph)
                graph = inference(graph)
            backward = bool(kwargs.get("is_backward"))
            slots: list[Slot] = []
            if backward:
                slots, misses = add_to_held(graph, examples, held=gradients.held, cost=self._cost)
                self.near_misses += misses
            if self._replacing is not None:
                graph, groups = self._replacing(graph)
                self.groups += groups
            _torch.read_before_writes(graph.graph)
            if not slots:
                return compiler(graph, graph_inputs, **kwargs)
            given = len(graph_inputs)
            kept = [*(kwargs.get("static_input_idxs") or ()), *range(given, given + len(slots))]
            graph_inputs = [*graph_inputs, *(slot.like for slot in slots)]
            compiled = compiler(graph, graph_inputs, **kwargs | {"static_input_idxs": kept})
            compiler.records[-1] = settled(compiler.records[-1], slots, held=gradients.held)
            return holding(compiled, slots)

        try:
            return _torch.compile_with_inductor(
                gm, inputs, partition, inner, OPERATIONS_LIMIT, least_memory_order, _cache_key()
            )
        finally:
            self.records = compiler.records
