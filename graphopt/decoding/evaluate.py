"""Runs a part of a captured graph that does not depend on the tokens, to see what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.aliasing import Aliases
from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.closure import closure
from graphopt.decoding.layouts import name_of
from graphopt.decoding.regions import Region
from graphopt.errors import CaptureError, brief

__all__ = ["added_by", "added_values", "numbers_in", "values_of"]


def values_of(
    uncached: Uncached,
    nodes: Sequence[fx.Node],
    aliases: Aliases,
    given: Mapping[str, torch.Tensor],
    replace: Callable[[fx.Node], Any] | None = None,
) -> list[Any]:
    """The values of ``nodes`` for inputs ``given`` by placeholder; what ``replace`` gives for a node that is
    not ``None`` is taken in place of what it computes."""
    known: dict[fx.Node, Any] = {}

    def argument(value: Any) -> Any:
        return fx.node.map_arg(value, lambda ref: known[ref])

    with torch.no_grad():
        for node in closure(nodes, aliases):
            if node.op == "placeholder":
                known[node] = given[node.name] if node.name in given else uncached.weights[node.name]
                continue
            if replace is not None and (value := replace(node)) is not None:
                known[node] = value
                continue
            known[node] = node.target(*argument(node.args), **argument(node.kwargs))  # type: ignore[operator]
    return [known[node] for node in nodes]


def numbers_in(nodes: Sequence[fx.Node], aliases: Aliases) -> set[int]:
    """Integers that are written among the arguments of ``nodes`` and of what they are made of."""
    found: set[int] = set()

    def look(value: Any) -> None:
        if type(value) is int:
            found.add(abs(value))
        elif type(value) is float and value.is_integer():
            found.add(int(abs(value)))
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)

    for node in closure(nodes, aliases):
        look(node.args)
        look(list(node.kwargs.values()))
    return found


def added_by(
    uncached: Uncached, region: Region, aliases: Aliases
) -> tuple[Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], set[int]]:
    """What ``region`` adds to its scores, as ``graphopt.decoding.masks`` wants to be told, and the numbers
    in it."""
    nodes = [entry.node for entry in region.added if entry.node is not None]
    numbers = numbers_in(nodes, aliases)

    def evaluate(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        tokens = torch.zeros(2, len(positions), dtype=torch.int64, device=positions.device)
        index = positions.expand(2, -1).contiguous() if uncached.positions else None
        given = arguments_of(uncached, tokens, mask, index)
        dense = bool((positions == torch.arange(len(positions), device=positions.device)).all())
        chosen = None if dense else lambda node: _chosen(node, uncached, positions)
        try:
            values = values_of(uncached, nodes, aliases, given, chosen)
            return _sum_of(region, dict(zip(nodes, values, strict=True)), positions)
        except Exception as error:
            raise CaptureError(
                f"the mask could not be looked at at {len(positions)} chosen positions: {brief(error)}"
            ) from error

    return evaluate, numbers


def _chosen(node: fx.Node, uncached: Uncached, positions: torch.Tensor) -> torch.Tensor | None:
    value = node.meta.get("val")
    if name_of(node) == "arange" and isinstance(value, torch.Tensor) and uncached.is_length(value.shape[0]):
        return positions.to(value.dtype)
    return None


def _sum_of(region: Region, values: Mapping[fx.Node, Any], positions: torch.Tensor) -> torch.Tensor:
    size = len(positions)
    total = added_values(region, values, (size, size), positions.device)
    if any(entry.node is None for entry in region.added):
        total = total.masked_fill(positions[None, :] > positions[:, None], float("-inf"))
    return total.expand(2, -1, size, size)


def added_values(
    region: Region, values: Mapping[fx.Node, Any], size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """What ``values``, of the nodes that ``region`` adds, come to for two sequences: float64 [2, H or 1,
    rows, keys], -inf where nothing may be read."""
    total = torch.zeros(2, 1, *size, dtype=torch.float64, device=device)
    lowest = float("-inf")
    for entry in region.added:
        if entry.node is None:
            continue
        value = _four_dimensions(values[entry.node], region)
        if entry.kind == "bias":
            total = total + torch.where(value <= -1e4, lowest, value.double() * entry.factor)
        else:
            hidden = value.bool() if entry.kind == "hide" else ~value.bool()
            total = torch.where(hidden, lowest, total)
    return total


def _four_dimensions(value: torch.Tensor, region: Region) -> torch.Tensor:
    """[B * H, ..] and less as [B, H, .., ..]."""
    if value.dim() == 3 and value.shape[0] == 2 * region.heads:
        return value.view(2, region.heads, *value.shape[1:])
    return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
