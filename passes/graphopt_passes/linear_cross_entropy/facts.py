"""What is known of a program beyond its calls, for putting one operator in the place of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.capture.trained import trained_values
from graphopt.order import has_effect
from graphopt.program import Program

__all__ = ["Facts", "Found"]


class Found(Protocol):
    """Calls from the ``first`` to the ``loss``, which go: ``operands`` are what the operator reads in their
    place, ``sums`` those of ``nodes`` that give log-sum-exps."""

    @property
    def loss(self) -> fx.Node: ...

    @property
    def sums(self) -> tuple[fx.Node, ...]: ...

    @property
    def nodes(self) -> tuple[fx.Node, ...]: ...

    @property
    def operands(self) -> tuple[fx.Node, ...]: ...

    @property
    def first(self) -> fx.Node: ...


@dataclass(frozen=True)
class Facts:
    """What is known of a program beyond its calls: where gradients flow, what is written in place."""

    line: Line
    trained: frozenset[fx.Node]

    @classmethod
    def of(cls, program: Program, *, trains: bool) -> Facts:
        line = line_of(program.graph)
        switches = line.ambient.entry_grad is not None
        return cls(line, trained_values(line) if trains or switches else frozenset())

    def reason(self, match: Found) -> Reason | None:
        """Why an operator in the place of ``match`` would compute something else."""
        operands = match.operands
        stopped = next((node for node in match.nodes if node not in self.trained), None)
        if stopped is not None and any(node in self.trained for node in operands):
            return Reason("it cuts off a gradient", (stopped.name,))
        # The operator runs where the loss did: what it reads must still hold then what the product read.
        position = self.line.position
        roots = {root for node in operands for root in self.line.aliases.roots[node]}
        for node in self.line.nodes[position[match.first] + 1 : position[match.loss]]:
            written = {root for ref in written_inputs(node) for root in self.line.aliases.roots[ref]}
            if written & roots:
                return Reason("what it reads is written before the loss", (node.name,))
        early = [position[node] for node in match.sums if position[node] < position[match.loss]]
        for node in self.line.nodes[min(early) : position[match.loss]] if early else ():
            if has_effect(node):
                why = "the log-sum-exps are read before the loss, and a call between has an effect"
                return Reason(why, (node.name,))
        # The operator's backward needs its log-sum-exps as they were.
        sums = {root for node in match.sums for root in self.line.aliases.roots[node]}
        for node in self.line.nodes[position[match.first] + 1 :] if sums else ():
            if sums & {root for ref in written_inputs(node) for root in self.line.aliases.roots[ref]}:
                return Reason("the log-sum-exps are written in place", (node.name,))
        return None
