"""Storage-level alias analysis: which outputs of a node are new memory and which are views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import tensor_leaves

__all__ = ["Leaf", "value_table"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that a node yields. ``bytes`` is its whole storage's.

    ``alias`` is ``None`` for new memory, else (node, leaf index) whose storage it shares. Only
    direct inputs and earlier leaves of the same node count: a node that is run again yields new
    memory even though both runs share one fake tensor.
    """

    bytes: int
    alias: tuple[str, int] | None


def value_table(graph: fx.Graph) -> dict[str, tuple[Leaf, ...]]:
    """Leaves of every node of a graph whose nodes carry ``meta["val"]``.

    Placeholders that share a storage (tied weights, views passed in) alias the first of them.
    """
    table: dict[str, tuple[Leaf, ...]] = {}
    graph_inputs: dict[int, tuple[str, int]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        seen: dict[int, tuple[str, int]] = {}
        if node.op in ("placeholder", "get_attr"):
            seen = graph_inputs
        else:
            for source in node.all_input_nodes:
                for index, tensor in enumerate(tensor_leaves(source.meta.get("val"))):
                    seen.setdefault(_storage_key(tensor), (source.name, index))
        leaves = []
        for index, tensor in enumerate(tensor_leaves(node.meta.get("val"))):
            key = _storage_key(tensor)
            leaves.append(Leaf(_storage_bytes(tensor), seen.get(key)))
            seen.setdefault(key, (node.name, index))
        table[node.name] = tuple(leaves)
    return table


def _storage_key(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _storage_bytes(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return _torch.hint(tensor.element_size() * tensor.numel())
    return _torch.hint(tensor.untyped_storage().nbytes())
