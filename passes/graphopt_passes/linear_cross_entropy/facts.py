"""What is known of a program beyond its calls, for putting one operator in the place of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.capture.trained import trained_values
from graphopt.order import has_effect
from graphopt.program import Program
from graphopt.rules import argument

__all__ = ["Facts", "Found"]

_CAST = (torch.bfloat16, torch.float16, torch.float32)


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
        if (refused := self._weights_refused(match.loss)) is not None:
            return refused
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

    def _weights_refused(self, loss: fx.Node) -> Reason | None:
        """Why no operator takes the weights of the classes: where torch would raise, the call stays."""
        weight = argument(loss, "weight")
        if weight is None:
            return None
        if weight in self.trained and loss in self.trained:
            return Reason("the class weights require a gradient, which torch has none of", (weight.name,))
        value, logits = weight.meta["val"], argument(loss, "self").meta["val"]
        if value.device != logits.device:
            where = f"the class weights are on {value.device}, the logits on {logits.device}"
            return Reason(where, (weight.name,))
        # An autocast region casts both: the innermost of the device, unless it switches casts off.
        state = self.line.ambient.states[self.line.position[loss]]
        kinds = [enter.args[2] for enter in state.autocast if enter.args[0] == logits.device.type]
        casts = bool(kinds and kinds[-1]) and value.dtype in _CAST
        if value.dtype is not logits.dtype and not casts:
            given, read = (str(each.dtype).removeprefix("torch.") for each in (value, logits))
            return Reason(f"the class weights are {given}, the logits {read}", (weight.name,))
        return None
