"""What recurrences keep from step to step: states, one row of memory for each sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached
from graphopt.decoding.convolutions import causal_convolutions
from graphopt.decoding.recurrence import Recurrence, recurrences_in
from graphopt.decoding.sites import Site, tensors_of
from graphopt.errors import CaptureError
from graphopt.program import layer_of

__all__ = ["Held", "State", "kept_bytes", "kept_tensors", "states_of"]


@dataclass(frozen=True)
class State:
    """A value that rows hand on: ``shape`` of that of one sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Held:
    """A recurrence, the call ``node`` of the captured graph, and its states by name."""

    node: fx.Node
    layer: str
    kinds: Mapping[str, State]


def states_of(uncached: Uncached) -> tuple[Held, ...]:
    """The states of all recurrences, in the order of the program.

    Raises ``CaptureError`` for a state that is not one row of each sequence: whose first dimension is not the
    batch, that grows with the sequence, or that begins with another dtype than it goes on with.
    """
    found = []
    for node in recurrences_in(uncached.gm.graph):
        assert isinstance(node.target, Recurrence)
        layer = layer_of(node)
        made, states = len(node.target.made), node.meta["val"]
        kinds = {}
        begins: Any = node.args[0]
        for index, (value, initial) in enumerate(zip(states[made:], begins, strict=True)):
            kinds[f"state{index}"] = _state(value, initial.meta["val"], layer or node.name, uncached)
        found.append(Held(node, layer, kinds))
    return tuple(found)


def _state(value: torch.Tensor, initial: torch.Tensor, where: str, uncached: Uncached) -> State:
    shape = list(value.shape)
    numbers = all(isinstance(size, int) for size in shape[1:])
    if not shape or not _torch.is_same_size(shape[0], uncached.batch) or not numbers:
        raise CaptureError(
            f"the state of {where} is {list(map(str, shape))}: what is kept is one row [batch, "
            "...] for each sequence"
        )
    if torch.promote_types(value.dtype, initial.dtype) is not value.dtype:
        raise CaptureError(
            f"the state of {where} begins as {initial.dtype} and goes on as {value.dtype}, which "
            "does not hold it"
        )
    return State(tuple(shape[1:]), value.dtype)


def kept_tensors(
    uncached: Uncached, sites: Sequence[Site], batch: int, capacity: int
) -> Mapping[tuple[int, str], tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of all that lasts from step to step: tensors of stores by site and name, behind them
    what convolutions read last, and behind those the states of recurrences."""
    found = dict(tensors_of(sites, batch, capacity))
    convolutions = causal_convolutions(uncached)
    for index, one in enumerate(convolutions, len(sites)):
        found[index, "history"] = ((batch, one.channels, one.reach), one.dtype)
    for index, held in enumerate(states_of(uncached), len(sites) + len(convolutions)):
        for name, state in held.kinds.items():
            found[index, name] = ((batch, *state.shape), state.dtype)
    return found


def kept_bytes(uncached: Uncached, batch: int) -> int:
    """Bytes of what convolutions and recurrences keep."""
    return sum(
        math.prod(shape) * dtype.itemsize for shape, dtype in kept_tensors(uncached, (), batch, 1).values()
    )
