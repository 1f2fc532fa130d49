"""Removes what nobody reads, writes into memory that nobody reads included.

Before::

    rope = new_empty(..); copy_(slice(rope, ..), turned)      nothing else reads ``rope``

After: neither, nor what ``turned`` was made of.
"""

from __future__ import annotations

import torch.fx as fx

from graphopt.capture.aliasing import written_inputs
from graphopt.decoding.layouts import name_of
from graphopt.order import has_effect

__all__ = ["remove_dead"]

_VIEWS = {
    "slice",
    "select",
    "view",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "narrow",
    "alias",
}
_FRESH = {
    "new_empty", "empty", "zeros", "new_zeros", "full", "ones", "new_ones", "new_full", "zeros_like",
    "ones_like", "empty_like", "full_like", "clone", "where", "triu", "tril", "mul", "add", "lift_fresh_copy",
}  # fmt: skip


def remove_dead(graph: fx.Graph) -> None:
    """Drop what nobody reads from ``graph``; placeholders stay."""
    while True:
        graph.eliminate_dead_code(is_impure_node=_must_stay)
        dead = {node for root in graph.nodes if name_of(root) in _FRESH for node in _written_in_vain(root)}
        if not dead:
            return
        for node in reversed(graph.nodes):
            if node in dead:
                graph.erase_node(node)


def _written_in_vain(root: fx.Node) -> set[fx.Node]:
    """Writes into memory that ``root`` makes, and the views that they go through, where nothing else reads
    it; nothing where something does."""
    found: set[fx.Node] = set()
    writes = False
    pending = list(root.users)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        into = written_inputs(node)
        views = name_of(node) in _VIEWS and not into
        if not views and not (len(into) == 1 and (into[0] is root or into[0] in found)):
            return set()
        reads = [source for source in node.all_input_nodes if source is root or source in found]
        if into and any(source is not into[0] for source in reads):
            return set()
        writes |= bool(into)
        found.add(node)
        pending.extend(node.users)
    return found if writes else set()


def _must_stay(node: fx.Node) -> bool:
    if name_of(node) == "dropout" and node.args[1:] and node.args[1] == 0:
        return False  # draws nothing
    return node.op == "placeholder" or has_effect(node)
