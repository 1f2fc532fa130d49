"""Causal convolutions over positions, which a step replaces by one over new rows and the last ones before.

Before, over a sequence [B, C, S]::

    slice(conv1d(x, w, b, padding=k - 1, groups=C), 2, 0, S)

After, for the rows at ``slots`` [n], ``history`` [B, C, k - 1] holding what was read last::

    causal_convolution(x[B,C,n], w, b, history, slots, 1, C)

Found by dataflow: what is convolved along the sequence, padded in front by as much as it reaches back and cut
to the length of the sequence reads no later row. Other convolutions along it are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt.decoding.capture import Uncached
from graphopt.decoding.layouts import name_of
from graphopt.decoding.regions import token_values
from graphopt.rules import argument

__all__ = ["OPERATOR", "Convolution", "causal_convolutions"]

OPERATOR = "graphopt::causal_convolution"


@dataclass(frozen=True)
class Convolution:
    """``node`` convolves ``source`` [B, ``channels``, S]; ``output`` is its first S rows. ``reach``: how many
    rows before its own a row reads."""

    node: fx.Node
    output: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    channels: int
    dilation: int
    groups: int
    reach: int
    dtype: torch.dtype


def causal_convolutions(uncached: Uncached) -> tuple[Convolution, ...]:
    """All that are understood, in the order of the program."""
    values = token_values(uncached)
    found = (_read(node, uncached, values) for node in uncached.gm.graph.nodes if name_of(node) == "conv1d")
    return tuple(one for one in found if one is not None)


def _read(node: fx.Node, uncached: Uncached, values: set[fx.Node]) -> Convolution | None:
    source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    if source not in values or weight in values or bias in values:
        return None
    rows, taps = source.meta["val"], weight.meta["val"].shape[2]
    if rows.dim() != 3 or not uncached.is_length(rows.shape[2]):
        return None
    padding, (stride,), (dilation,) = (argument(node, name) for name in ("padding", "stride", "dilation"))
    reach = dilation * (taps - 1)
    if stride != 1 or not reach or list(padding) != [reach]:
        return None
    (output,) = node.users if len(node.users) == 1 else (None,)
    if output is None or not _is_front(output, uncached):
        return None
    groups = argument(node, "groups")
    return Convolution(
        node, output, source, weight, bias, int(rows.shape[1]), dilation, groups, reach, rows.dtype
    )


def _is_front(node: fx.Node, uncached: Uncached) -> bool:
    """Whether ``node`` takes the first rows of [B, C, rows], as many as the sequence has."""
    if name_of(node) != "slice":
        return False
    dim, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    length = node.meta["val"].shape[2]
    return dim in (2, -1) and start in (0, None) and step == 1 and uncached.is_length(length)
