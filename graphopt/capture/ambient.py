"""Ambient state of a graph: which autocast regions and which gradient mode a node runs under.

Dynamo writes such regions into the graph as calls in a row, not as scopes:

    _enter_autocast -> linear -> ... -> _exit_autocast

so that a part of the graph means something else when it runs alone. ``Ambient`` says what to
establish before a part and to undo after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason

__all__ = ["Ambient", "AmbientMap", "ambient_map", "is_state_call"]


@dataclass(frozen=True)
class Ambient:
    """``autocast``: the enter calls whose regions are open, outermost first. ``grad``: the gradient
    mode where it differs from the one that the graph is called under, else ``None``."""

    autocast: tuple[fx.Node, ...] = ()
    grad: bool | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two states that compute the same, whichever calls established them."""
        return (tuple(node.args for node in self.autocast), self.grad)


@dataclass(frozen=True)
class AmbientMap:
    """``states[i]`` holds before node ``i`` of the row; the last entry holds after the row.

    ``entry_grad`` is the gradient mode that the graph is called under, ``None`` where the graph
    never switches it. ``unknown`` says from which position on the state cannot be known, and why.
    """

    states: tuple[Ambient, ...]
    entry_grad: bool | None
    unknown: tuple[int, Reason] | None


def is_state_call(node: fx.Node) -> bool:
    """Whether a node opens or closes an autocast region or switches gradients."""
    return node.target in (_torch.enter_autocast(), _torch.exit_autocast(), _torch.set_grad_enabled())


def ambient_map(nodes: Sequence[fx.Node]) -> AmbientMap:
    """The ambient state before each node of a graph in execution order.

    Regions are bracketed, so the last switch of the gradient mode restores the mode of entry. With an
    odd number of switches one is not undone, and the mode of entry cannot be told from the graph.
    """
    switches = [(i, node) for i, node in enumerate(nodes) if node.target is _torch.set_grad_enabled()]
    entry_grad = bool(switches[-1][1].args[0]) if switches else None
    unknown = None
    if len(switches) % 2:
        position, node = switches[0]
        reason = Reason("the graph switches the gradient mode and does not restore it", (node.name,))
        unknown = (position + 1, reason)
    state = Ambient()
    states = []
    for node in nodes:
        states.append(state)
        if node.target is _torch.set_grad_enabled():
            mode = bool(node.args[0])
            state = Ambient(state.autocast, None if mode == entry_grad else mode)
        elif node.target is _torch.enter_autocast():
            state = Ambient((*state.autocast, node), state.grad)
        elif node.target is _torch.exit_autocast():
            state = Ambient(tuple(n for n in state.autocast if n is not node.args[0]), state.grad)
    states.append(state)
    return AmbientMap(tuple(states), entry_grad, unknown)
