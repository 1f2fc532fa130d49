"""Gradients that autograd would not make, of programs of which some outputs were not differentiated.

A program's backward takes a gradient of every output. Where none arrives, autograd gives it zeros, and what
is made of them alone is zero as well::

    h, extra = program(x)        loss = head(h).sum()        extra is used for no loss
    eager:      extra's weight.grad is None        an optimizer leaves the weight as it is
    zeros:      extra's weight.grad is 0           an optimizer decays it, and its averages

So hooks of the backward take those gradients away again, as op by op nothing would have made them, and
with them those that the programs before would make of them. What a gradient is made of is read off the joint
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from graphopt import _torch
from graphopt.program import Program

__all__ = ["leaving_unreached", "made_of"]


def made_of(joint: Program) -> tuple[dict[int, int], int]:
    """Which of the outputs' gradients each input's gradient is made of, by the number of the argument: a bit
    for each. And how many there are. Inputs that are no argument, as states of generators, are left out."""
    arguments = {node: index for node, role, index in _torch.describe_joint(joint.gm)[0] if role == "input"}
    tangents = [spec.node for spec in joint.signature.by_role("tangent")]
    bits: dict[Any, int] = {}
    number = {name: 1 << k for k, name in enumerate(tangents)}
    for node in joint.graph.nodes:
        found = number.get(node.name, 0)
        for source in node.all_input_nodes:
            found |= bits[source]
        bits[node] = found
    named = {node.name: node for node in joint.graph.nodes}
    known: dict[str, int] = {}
    for spec in joint.signature.inputs:
        index = arguments.get(spec.node, -1)
        for name in (spec.node, spec.fqn):
            if name and index >= 0:
                known.setdefault(name, index)
    made: dict[int, int] = {}
    for output in joint.signature.outputs:
        if output.role == "gradient" and output.target in known:
            found = bits[named[output.node]]
            if found:
                index = known[output.target]
                made[index] = made.get(index, 0) | found
    return made, len(tangents)


def leaving_unreached(run: Callable[..., Any], joint: Callable[[], Program | None]) -> Callable[..., Any]:
    """``run``, a program of the graph that ``joint()`` gives once it was traced, whose backward makes no
    gradient of outputs' gradients that are not there."""
    made: dict[int, int] = {}
    counts: list[int] = []
    places: dict[type, dict[int, int]] = {}

    def call(*args: Any) -> Any:
        outputs = run(*args)
        if not torch.is_grad_enabled():
            return outputs
        if not counts:
            program = joint()
            if program is None:
                return outputs
            found, count = made_of(program)
            made.update(found)
            counts.append(count)
        if made and (backward := _backward_of(outputs, counts[0])) is not None:
            node, order = backward
            # Of code that is made anew the node is another, and may count otherwise.
            if type(node) not in places:
                places[type(node)] = _places(node, args, made)
            node.register_prehook(partial(_notice, order, places[type(node)]))
        return outputs

    return call


def _backward_of(outputs: Any, count: int) -> tuple[Any, list[int]] | None:
    """The node of autograd's graph that takes ``count`` gradients of ``outputs``, and their numbers; ``None``
    where it is not one, as where outputs are views of each other."""
    given = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    found = {tensor.output_nr: tensor.grad_fn for tensor in given if tensor.grad_fn is not None}
    nodes = set(found.values())
    return (nodes.pop(), sorted(found)) if len(found) == count and len(nodes) == 1 else None


def _places(node: Any, args: Sequence[Any], made: Mapping[int, int]) -> dict[int, int]:
    """``made``, by the number that an input's gradient has among those that ``node`` gives. One value may be
    given twice, and its gradients be added up."""
    places: dict[int, int] = {}
    for index, bits in made.items():
        value = args[index] if index < len(args) else None
        if isinstance(value, torch.Tensor) and value.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(value)
            for place, (taker, taken) in enumerate(node.next_functions):
                if taker is edge.node and taken == edge.output_nr:
                    places[place] = places.get(place, 0) | bits
    return places


def _notice(order: Sequence[int], places: Mapping[int, int], given: tuple[Any, ...]) -> None:
    """Before a backward: see to it that gradients go that are made of none of those ``given``. A hook for
    after it has autograd hold what is given meanwhile, so there is one only where something goes."""
    missing = sum(1 << k for k, place in enumerate(order) if given[place] is None)
    gone = {place for place, bits in places.items() if not bits & ~missing}
    if not gone:
        return

    def without(gradients: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
        handle.remove()
        return tuple(None if place in gone else gradient for place, gradient in enumerate(gradients))

    handle = _torch.running_node().register_hook(without)
