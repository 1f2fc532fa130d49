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

__all__ = ["InductorEmitter", "JointSeen", "environment"]


class JointSeen(Exception):
    """Raised by a partition that only wanted to see the joint graph; compilation ends there."""


@functools.cache
def _cache_key() -> str:
    """Names what graphopt changes of Inductor, in the keys of its graph cache: the sources of the changes."""
    sources = "".join(map(inspect.getsource, (_torch, kernel_order)))
    return f"graphopt {hashlib.sha256(sources.encode()).hexdigest()}"


class InductorEmitter:
    """Inductor for both halves. ``records`` holds the memory of each graph compiled last, ``groups`` what
    ``replacing`` said of groups of operators of all graphs, ``slots`` the gradients that the backward
    compiled last adds to those held.

    Gradients of weights are added to ``.grad`` by the products that make them (``held_products``);
    ``near_misses`` says which are not, and why. ``cost`` predicts what is faster.
    """

    name = "inductor"
    fuses = True
    by_segments = True

    def __init__(self, replacing: Replacing | None = None, cost: CostModel | None = None) -> None:
        self.granularity = 1 if cost is None else cost.device.allocation_granularity
        self._cost = cost
        self.near_misses: list[NearMiss] = []
        self.records: list[LoweredMemory] = []
        self.groups: list[GroupRecord] = []
        self.slots: tuple[Slot, ...] = ()
        self._replacing = replacing

    def note(self, groups: Sequence[GroupRecord], near_misses: Sequence[NearMiss]) -> None:
        self.groups, self.near_misses = list(groups), list(near_misses)

    def compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        partition: Partition,
        inference: Inference,
        gradients: Gradients = NONE,
        keep: str = "",
    ) -> Callable[..., Any]:
        examples = [x if k in gradients.parameters else None for k, x in enumerate(inputs)]
        compiler = LoweredCompiler(granularity=self.granularity)
        self.slots = ()

        def inner(graph: fx.GraphModule, graph_inputs: Sequence[Any], **kwargs: Any) -> Any:
            if kwargs.get("is_inference"):
                graph = inference(graph)
            backward = bool(kwargs.get("is_backward"))
            slots: list[Slot] = []
            if backward:
                slots, misses = add_to_held(graph, examples, held=gradients.held, cost=self._cost)
                self.near_misses += misses
                self.slots = tuple(slots)
            if self._replacing is not None:
                graph, groups = self._replacing(graph)
                self.groups += groups
            _torch.read_before_writes(graph.graph)
            if not slots:
                compiled = compiler(graph, graph_inputs, **kwargs)
                # Code that Inductor's cache does not have is hidden from AOTAutograd's.
                return compiled if _torch.is_known_to_caches(compiled) or not keep else _plain(compiled)
            given = len(graph_inputs)
            kept = [*(kwargs.get("static_input_idxs") or ()), *range(given, given + len(slots))]
            graph_inputs = [*graph_inputs, *(slot.like for slot in slots)]
            compiled = compiler(graph, graph_inputs, **kwargs | {"static_input_idxs": kept})
            compiler.records[-1] = settled(compiler.records[-1], slots, held=gradients.held)
            return _torch.known_to_caches(holding(compiled, slots), compiled)

        try:
            return _torch.compile_with_inductor(
                gm, inputs, partition, inner, OPERATIONS_LIMIT, least_memory_order, _cache_key(), keep
            )
        finally:
            self.records = compiler.records


def environment() -> str:
    """Names all that the code made here depends on besides graphs."""
    return _torch.code_environment(OPERATIONS_LIMIT, least_memory_order, _cache_key())


def _plain(compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return _torch.boxed(lambda arguments: compiled(arguments))
