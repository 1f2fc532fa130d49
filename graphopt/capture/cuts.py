"""Where a program may be cut in two without changing what it computes.

A cut before node ``i`` is refused where
- memory that is written in place at ``i`` or later was read or made before ``i``: two separately
  compiled parts would each see their own copy, and views made before the cut would go stale;
- a value crosses that a compiled part cannot take or give: tuples, handles, sizes known only when
  the program runs;
- the ambient state is not known, or calls of unknown effect stand on both sides.

Open autocast and no-grad regions do not forbid a cut: they are established again in each part.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.ambient import is_state_call
from graphopt.capture.structure import Line

__all__ = ["CutMap", "cut_map"]


@dataclass(frozen=True)
class CutMap:
    """``free[i]``: whether the line may be cut before node ``i`` (0 and ``len(nodes)`` are free).

    ``spans`` are the ranges ``(start, stop, reason)``, ends included, of positions that are not.
    """

    free: tuple[bool, ...]
    spans: tuple[tuple[int, int, Reason], ...]

    def why_not(self, position: int) -> Reason | None:
        """Why the line may not be cut before node ``position``; ``None`` where it may."""
        return next((reason for start, stop, reason in self.spans if start <= position <= stop), None)


def cut_map(line: Line) -> CutMap:
    """Examine every position of ``line``. Linear in the size of the graph."""
    size = len(line.nodes)
    spans = [span for span in _spans(line) if span[0] <= span[1]]
    spans.sort(key=lambda span: (span[0], -span[1], span[2].text, span[2].nodes))
    change = [0] * (size + 2)
    for start, stop, _ in spans:
        change[start] += 1
        change[stop + 1] -= 1
    depth = list(accumulate(change))[: size + 1]
    free = [d == 0 for d in depth]
    free[0] = free[size] = True
    return CutMap(tuple(free), tuple(spans))


def _spans(line: Line) -> Iterator[tuple[int, int, Reason]]:
    yield from _writes(line)
    yield from _crossings(line)
    yield from _unknown_calls(line)
    if line.ambient.unknown is not None:
        start, reason = line.ambient.unknown
        yield start, len(line.nodes), reason


def _writes(line: Line) -> Iterator[tuple[int, int, Reason]]:
    """From the first touch of written memory to its last write; later reads may stand apart."""
    roots = line.aliases.roots
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(line.nodes):
        for touched in (node, *node.all_input_nodes):
            for root in roots[touched] & line.aliases.written:
                first.setdefault(root, i)
        for ref in written_inputs(node):
            last.update(dict.fromkeys(roots[ref], i))
    for root, stop in last.items():
        writer = line.nodes[stop]
        text = "memory is written in place after it was used"
        yield first[root] + 1, stop, Reason(text, (root.name, writer.name))


def _crossings(line: Line) -> Iterator[tuple[int, int, Reason]]:
    last = line.last_reads()
    unbacked: dict[Any, tuple[int, fx.Node]] = {}
    ends: dict[Any, int] = {}
    for i, node in enumerate(line.nodes):
        value = node.meta.get("val")
        if not _passable(value) and not is_state_call(node):
            kind = type(value).__name__
            yield i + 1, last.get(node, i), Reason(f"a {kind} cannot be passed between parts", (node.name,))
        for symbol in _unbacked(value):
            unbacked.setdefault(symbol, (i, node))
            ends[symbol] = max(ends.get(symbol, i), i)
            ends[symbol] = max(ends[symbol], min(last.get(node, i), len(line.nodes) - 1))
    for symbol, (start, node) in unbacked.items():
        text = f"size {symbol} is known only when the program runs"
        yield start + 1, ends[symbol], Reason(text, (node.name,))


def _unknown_calls(line: Line) -> Iterator[tuple[int, int, Reason]]:
    unknown = [i for i, node in enumerate(line.nodes) if not _known(node)]
    if len(unknown) > 1:
        nodes = (line.nodes[unknown[0]].name, line.nodes[unknown[-1]].name)
        text = "calls whose effect on later calls is unknown are kept together"
        yield unknown[0] + 1, unknown[-1], Reason(text, nodes)


def _passable(value: Any) -> bool:
    return value is None or isinstance(value, (torch.Tensor, torch.SymInt, int, float, bool))


def _unbacked(value: Any) -> set[Any]:
    if isinstance(value, torch.Tensor):
        # Most tensors have plain sizes; the general answer is slow.
        plain = value.layout is torch.strided and all(type(size) is int for size in value.shape)
        return set() if plain else set(free_unbacked_symbols(value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(free_unbacked_symbols(value))
    if isinstance(value, (tuple, list)):
        return {symbol for item in value for symbol in _unbacked(item)}
    return set()


def _known(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if _torch.is_operator(node.target) or is_state_call(node):
        return True
    module = getattr(node.target, "__module__", "") or ""
    pure = (operator.__name__, "_operator", math.__name__, builtins.__name__)
    return module in pure or str(getattr(node.target, "__name__", "")).startswith("sym_")
