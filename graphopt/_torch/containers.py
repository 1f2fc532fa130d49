"""Containers that pytrees know."""

from __future__ import annotations

from typing import Any

__all__ = ["container_classes", "container_of", "container_parts"]


def container_classes() -> list[type]:
    """Classes that pytrees know as containers, torch's internal ones left out."""
    from torch.utils._pytree import SUPPORTED_NODES

    return [kind for kind in SUPPORTED_NODES if not kind.__module__.startswith("torch._")]


def container_parts(value: Any) -> tuple[list[Any], Any] | None:
    """The items of a container and what tells how they go together; ``None`` for what is no container."""
    from torch.utils._pytree import SUPPORTED_NODES

    if type(value) not in container_classes():
        return None
    items, context = SUPPORTED_NODES[type(value)].flatten_fn(value)
    return list(items), context


def container_of(kind: type, items: list[Any], context: Any) -> Any:
    """The container that ``container_parts`` took apart."""
    from torch.utils._pytree import SUPPORTED_NODES

    return SUPPORTED_NODES[kind].unflatten_fn(items, context)
