"""Values of nodes after an edit: ``meta["val"]`` of those that are new, changed, or reached by a change.

Nothing else is computed again: propagating shapes through a whole graph takes seconds on large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.ambient import Ambient, ambient_map
from graphopt.errors import PassError, brief
from graphopt.program import tensor_leaves

__all__ = ["compute_values", "memory_owners"]


def memory_owners(values: Iterable[tuple[fx.Node, Any]]) -> dict[int, fx.Node]:
    """For every storage under the ``values`` of nodes, in order, the first node that has it."""
    owners: dict[int, fx.Node] = {}
    for node, value in values:
        for tensor in tensor_leaves(value):
            owners.setdefault(_storage(tensor), node)
    return owners


def compute_values(graph: fx.Graph, stale: set[fx.Node], owners: Mapping[int, fx.Node], origin: str) -> None:
    """Compute the values of ``stale`` nodes, and of users as far as a change of type or memory reaches.

    ``owners`` are the graph's before the edit. Runs under the graph's fake mode and under the autocast
    regions that hold at each node. Raises ``PassError`` for a node that does not run.
    """
    known = [leaf for node in graph.nodes for leaf in tensor_leaves(node.meta.get("val"))]
    mode = _torch.fake_mode_of(known)
    nodes = list(graph.nodes)
    stale = set(stale)
    for node, ambient in zip(nodes, ambient_map(nodes).states, strict=False):
        if node not in stale or node.op not in ("call_function", "call_method"):
            continue
        value = _value(node, ambient, mode, origin)
        if "val" in node.meta and _types(value) == _types(node.meta["val"]):
            own = all(owners.get(_storage(t)) is node for t in tensor_leaves(node.meta["val"]))
            if own and not _is_view(node, value):
                continue
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)
        stale.update(node.users)


def _value(node: fx.Node, ambient: Ambient, mode: Any, origin: str) -> Any:
    def load(source: fx.Node) -> Any:
        if "val" in source.meta:
            return source.meta["val"]
        if source.op == "get_attr":
            return _torch.fake_attribute(source, mode)
        raise PassError(f"{origin}: node {node.name!r} reads {source.name!r}, which has no value")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        stack.enter_context(_torch.python_dispatcher())
        for enter in ambient.autocast:
            stack.enter_context(_torch.autocast_of(enter))
        try:
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)
        except Exception as error:
            what = f"the value of node {node.name!r} ({node.target}) cannot be computed"
            raise PassError(f"{origin}: {what}: {brief(error)}") from error


def _is_view(node: fx.Node, value: Any) -> bool:
    read = {_storage(t) for source in node.all_input_nodes for t in tensor_leaves(source.meta.get("val"))}
    return any(_storage(t) in read for t in tensor_leaves(value))


def _types(value: Any) -> list[str]:
    # Text, because comparing symbolic sizes would add guards.
    return [_type(leaf) for leaf in torch.utils._pytree.tree_leaves(value)]


def _type(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return f"{type(leaf).__name__} {leaf}"
    sizes = [*leaf.shape]
    if leaf.layout is torch.strided:
        sizes += [*leaf.stride(), leaf.storage_offset()]
    return f"{leaf.dtype} {leaf.device} {leaf.layout} {leaf.dim()} {' '.join(map(str, sizes))}"


def _storage(tensor: torch.Tensor) -> int:
    return _torch.storage_key(tensor) if tensor.layout is torch.strided else id(tensor)
